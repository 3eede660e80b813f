"""NVIDIA's tritonclient over HTTP: numpy in, numpy out."""

from __future__ import annotations

import numpy as np
import tried
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

client = triton.InferenceServerClient(tried.ENDPOINT.removeprefix("http://"))
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), dtype=np.uint8)


def given(array: np.ndarray, datatype: str = "UINT8", binary: bool = True) -> list[triton.InferInput]:
    part = triton.InferInput("image", list(array.shape), datatype)
    part.set_data_from_numpy(array, binary_data=binary)
    return [part]


def health() -> None:
    """health, metadata"""
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(tried.IMAGES)
    metadata = client.get_model_metadata(tried.IMAGES)
    assert metadata["inputs"][0]["name"] == "image"
    assert {part["name"] for part in metadata["outputs"]} >= {"label", "scores"}


def binary() -> None:
    """infer, binary (the client's default)"""
    answer = client.infer(tried.IMAGES, given(IMAGES))
    assert answer.as_numpy("label").shape == (3,)
    assert answer.as_numpy("scores").shape == (3, 3)
    assert np.allclose(answer.as_numpy("scores").sum(axis=1), 1, atol=1e-3)


def outputs() -> None:
    """infer, chosen outputs, JSON both ways, the same numbers"""
    wanted = [triton.InferRequestedOutput("scores", binary_data=False)]
    plain = client.infer(tried.IMAGES, given(IMAGES, binary=False), outputs=wanted).as_numpy("scores")
    assert np.allclose(plain, client.infer(tried.IMAGES, given(IMAGES)).as_numpy("scores"), atol=1e-5)


def files() -> None:
    """BYTES: images as files"""
    file = b"P5 8 8 255\n" + IMAGES[0].tobytes()
    label = client.infer(tried.IMAGES, given(np.array([file], dtype=np.object_), "BYTES")).as_numpy("label")
    assert label[0] == client.infer(tried.IMAGES, given(IMAGES[:1])).as_numpy("label")[0]


def errors() -> None:
    """errors are InferenceServerException"""
    scaled = given(IMAGES.astype(np.float32) / 255, "FP32")
    assert "UINT8" in str(tried.error(InferenceServerException, lambda: client.infer(tried.IMAGES, scaled)))


tried.run(health, binary, outputs, files, errors)
