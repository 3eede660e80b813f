"""What Kubernetes takes as a name, a quantity or an image, and its own words for what is wrong. Pure."""

from __future__ import annotations

import re
from decimal import Decimal

CLUSTER_NAME, OWNER_NAME = 53, 47
"""Characters of a RayCluster's name, and of a RayJob's or RayService's, which gets six more for its cluster.

The services that KubeRay makes add ten (`-serve-svc`), and a service's name has 63 at most.
"""
_LABEL_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_LABEL_1123 = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?")
_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)([numkMGTPE]|[KMGTPE]i|[eE][+-]?[0-9]+)?")
_BINARY = {f"{letter}i": 1024**power for power, letter in enumerate("KMGTPE", 1)}
_DECIMAL = {"n": Decimal("1e-9"), "u": Decimal("1e-6"), "m": Decimal("1e-3"), "k": Decimal(1000)}
_DECIMAL |= {letter: Decimal(1000) ** power for power, letter in enumerate("MGTPE", 2)}
_PART = r"[a-z0-9]+(?:[._-]+[a-z0-9]+)*"
_IMAGE = re.compile(
    rf"(?:[a-zA-Z0-9.-]+(?::[0-9]+)?/)?{_PART}(?:/{_PART})*"
    r"(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}))?(?:@(?P<digest>sha256:[0-9a-f]{64}))?"
)
_TOKENS = re.compile(
    r"(?i)^(sk-|hf_|ghp_|github_pat_|glpat-|xox[bp]-|akia[0-9a-z]{12}|eyj[a-z0-9_-]{10}|[0-9a-f]{32,}$)"
    r"|://[^/@\s]*:[^/@\s]+@|[?&](password|token|sig|signature)="
)


def wrong_name(value: str, longest: int = 63) -> str | None:
    """Say why a value cannot name an object that services are named after; None: it can."""
    if not _LABEL_1035.fullmatch(value):
        return "takes small letters, digits and '-', beginning with a letter and not ending in '-'"
    if len(value) > longest:
        return f"has {len(value)} characters, and at most {longest} leave room for the names that KubeRay makes of it"
    return None


def wrong_label_name(value: str) -> str | None:
    """Say why a value cannot name a namespace, a group or a volume; None: it can."""
    if not _LABEL_1123.fullmatch(value) or len(value) > 63:
        return "takes small letters, digits and '-', 63 at most, beginning and ending with a letter or digit"
    return None


def wrong_subdomain(value: str) -> str | None:
    """Say why a value cannot name a secret, a claim or a class; None: it can."""
    if len(value) > 253 or not all(_LABEL_1123.fullmatch(part) for part in value.split(".")):
        return "takes small letters, digits, '-' and '.', beginning and ending with a letter or digit"
    return None


def wrong_label_value(value: str) -> str | None:
    """Say why a value cannot be that of a label; None: it can."""
    if not _LABEL_VALUE.fullmatch(value) or len(value) > 63:
        return "takes letters, digits, '-', '_' and '.', 63 at most, beginning and ending with a letter or digit"
    return None


def wrong_label_key(value: str) -> str | None:
    """Say why a value cannot be a label's key, `name` or `prefix/name`; None: it can."""
    prefix, slash, name = value.rpartition("/")
    if (slash and wrong_subdomain(prefix)) or not name or wrong_label_value(name):
        return "takes a name, or a domain, '/' and a name"
    return None


def looks_secret(value: str) -> bool:
    """Tell a secret by the forms that tokens and URLs with passwords have."""
    return bool(_TOKENS.search(value))


def is_no_name(value: str) -> bool:
    """Tell a secret from the name of a Secret: also by its length, with characters that no object's name holds."""
    return looks_secret(value) or (len(value) >= 16 and wrong_subdomain(value) is not None)


def quantity(text: str) -> Decimal:
    """Return an amount of memory (bytes), CPUs or a device: `32Gi`, `500m`, `1.5`.

    Raises:
        ValueError: it is none.
    """
    found = _QUANTITY.fullmatch(text)
    if found is None:
        raise ValueError("takes an amount such as 32Gi, 500M or 0.5 (Ki, Mi, Gi, Ti; k, M, G, T)")
    number, unit = Decimal(found[1]), found[2] or ""
    if unit in _BINARY:
        return number * _BINARY[unit]
    if unit in _DECIMAL:
        return number * _DECIMAL[unit]
    return number * Decimal(10) ** int(unit[1:]) if unit else number


def wrong_image(value: str) -> str | None:
    """Say why a value is no image that stays the same; None: it is one."""
    found = _IMAGE.fullmatch(value)
    if found is None:
        return "takes an image with its tag, such as registry.example/tandem:0.1.0"
    if found["digest"]:
        return None
    if not found["tag"]:
        return "has no tag, which means latest: another image each time a node pulls it; name a version or a digest"
    if found["tag"] == "latest":
        return "latest is another image each time a node pulls it; name a version or a digest"
    return None


def as_name(text: str) -> str:
    """Return the nearest name that Kubernetes takes: of small letters, digits and '-'."""
    plain = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    return plain if plain[:1].isalpha() else f"x{plain}"
