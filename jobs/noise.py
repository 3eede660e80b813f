"""Keep the libraries' remarks about themselves out of a job's log, so that what is in it is about the job."""

from __future__ import annotations

import logging
import os
import warnings

ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",
    "PYTHONWARNINGS": "ignore::FutureWarning,ignore::UserWarning,ignore::DeprecationWarning",
}


def quiet() -> None:
    """Lower the loggers of torchao (optional kernels it did not find) and of PyTorch's tree registry."""
    for name in ("torchao", "torch.utils._pytree", "DeepSpeed", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
