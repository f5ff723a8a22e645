"""The C of libraries that only hand out handles and succeed, and the tables of errors' names.

Which functions: those that PyTorch's libraries import and no source file of the bench defines. What
a function must write is told by its prototype in the public headers: handles of `...Create` and the
like become zeroed memory, sizes that are asked for 0, texts "simulated". A name that no public
header declares ends the process that calls it.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

__all__ = ["LIBRARIES", "Library", "error_table", "refusals", "stubs", "text_of"]


@dataclass(frozen=True)
class Library:
    """One of NVIDIA's libraries, as the bench plays it.

    Attributes:
        stem: its soname up to ".so".
        functions: what the names of its functions begin with.
        headers: patterns of the public headers that declare them.
    """

    stem: str
    functions: str
    headers: tuple[str, ...]


LIBRARIES = {
    "cudart": Library("libcudart", r"(__)?cuda[A-Z]", ("cuda_runtime_api.h",)),
    "cuda": Library("libcuda", r"cu(?!File)[A-Z]", ("cuda.h",)),
    "nvml": Library("libnvidia-ml", r"nvml", ()),
    "cublas": Library("libcublas", r"cublas(?!Lt)", ("cublas_api.h", "cublas_v2.h")),
    "cublaslt": Library("libcublasLt", r"cublasLt", ("cublasLt.h",)),
    "cudnn": Library("libcudnn", r"cudnn", ("cudnn_*.h",)),
    "cufft": Library("libcufft", r"cufft", ("cufft.h", "cufftXt.h")),
    "curand": Library("libcurand", r"curand", ("curand.h",)),
    "cusparse": Library("libcusparse", r"cusparse(?!Lt)", ("cusparse.h",)),
    "cusparselt": Library("libcusparseLt", r"cusparseLt", ("cusparseLt.h",)),
    "cusolver": Library("libcusolver", r"cusolver", ("cusolver*.h",)),
    "cufile": Library("libcufile", r"cuFile", ("cufile.h",)),
    "cupti": Library("libcupti", r"cupti", ("cupti_*.h",)),
    "nccl": Library("libnccl", r"nccl", ("nccl.h",)),
    "nvrtc": Library("libnvrtc", r"nvrtc", ("nvrtc.h",)),
    "nvshmem": Library("libnvshmem_host", r"nvshmem", ("**/nvshmem*.h",)),
}
"""By the name of our file, which must not be `lib*.so`: `torch/__init__.py` loads libraries by path
where it finds a "libcudart.so" among what is loaded. For the loader, the soname counts."""

_HANDS_OUT = re.compile(r"create|init|subscribe|getuniqueid|split|grow|shrink", re.IGNORECASE)
_ANSWERS = re.compile(
    "size|workspace|version|property|makeplan|workestimation|count|zeropivot|mode|dropped",
    re.IGNORECASE,
)
_NUMBERS = {
    "size_t": "size_t",
    "int": "int",
    "int64_t": "int64_t",
    "uint32_t": "uint32_t",
    "int32_t": "int32_t",
}

_NOT_SUPPORTED = 801
"""cudaErrorNotSupported and CUDA_ERROR_NOT_SUPPORTED."""

_HEAD = f"""#include "card.h"
#include <stdlib.h>
#define NOTE(name) static int seen; if (card_log_level) card_stub(#name, &seen);
#define REFUSE(name) int name(void) {{ WARN("%s: not simulated", #name); return {_NOT_SUPPORTED}; }}
"""


def text_of(headers: Collection[Path]) -> str:
    """Return the text of headers without comments and directives."""
    text = "\n".join(header.read_text(errors="replace") for header in headers)
    text = re.sub(r"/\*.*?\*/", " ", text, flags=re.DOTALL)
    return re.sub(r"//[^\n]*|^\s*#[^\n]*", " ", text, flags=re.MULTILINE)


def stubs(names: Collection[str], text: str) -> str:
    """Return C that defines functions that succeed, by their prototypes in a text."""
    handles = _handles_of(text)
    return _HEAD + "".join(_stub(name, text, handles) for name in sorted(names))


def refusals(names: Collection[str]) -> str:
    """Return C that defines functions of the runtime or the driver that say "not supported"."""
    return _HEAD + "".join(f"REFUSE({name})\n" for name in sorted(names))


def error_table(text: str, enum: str, variable: str) -> str:
    """Return C with the names of an enumeration's constants."""
    body = re.search(rf"enum\s+(?:\w+\s+)*{enum}\s*\{{(.*?)\}}", text, flags=re.DOTALL)
    assert body, enum
    constants = re.findall(r"(\w+)\s*=\s*(\d+)", body[1])
    rows = "".join(f'    {{{code}, "{name}"}},\n' for name, code in constants)
    row = "struct { int code; const char *name; }"
    return f"const {row} {variable}[] = {{\n{rows}    {{0, 0}},\n}};\n"


def _handles_of(text: str) -> set[str]:
    """Return the types that are pointers to something that no header tells."""
    named = re.findall(r"typedef\s+(?:const\s+)?struct\s+\w+\s*\*\s*(\w+)\s*;", text)
    nameless = re.findall(r"typedef\s+struct\s*\{\s*\}\s*\*(\w+)", text)
    return {*named, *nameless}


def _prototype(name: str, text: str) -> tuple[str, list[str]] | None:
    """Return what a function returns, and its parameters; None where no header declares it."""
    for match in re.finditer(rf"\b{name}\s*\(([^;{{}}()]*)\)\s*;", text):
        start = max(text.rfind(mark, 0, match.start()) for mark in ";{}")
        parameters = " ".join(match[1].split())
        returned = " ".join(text[start + 1 : match.start()].split())
        return returned, [] if parameters in ("", "void") else parameters.split(",")
    return None


def _stub(name: str, text: str, handles: set[str]) -> str:
    known = _prototype(name, text)
    if known is None:  # not public: there for the loader, which wants every name, never answered
        return f'void {name}(void) {{ card_not_public("{name}"); }}\n'
    returned, parameters = known
    declared, body = [], []
    for number, parameter in enumerate(parameters):
        parameter = re.sub(r"\b(const\s+)?(\w+)\s+(\w+)\s*\[\w*\]", r"\1\2 *\3", parameter)
        words = re.sub(r"\bstruct\b|=.*", "", parameter).split()
        base = next((word.strip("*") for word in words if word != "const"), "")
        stars = parameter.count("*")
        if not stars:
            declared.append(f"{base if base in ('float', 'double') else 'long'} p{number}")
            continue
        declared.append(f"void *p{number}")
        if "const" in words[:1] or stars > 1:
            continue
        if _HANDS_OUT.search(name) and base in handles:
            body.append(f"if (p{number}) *(void **)p{number} = calloc(1, 1024);")
        elif _ANSWERS.search(name) and base in _NUMBERS:
            body.append(f"if (p{number}) *({_NUMBERS[base]} *)p{number} = 0;")
    arguments = ", ".join(declared) or "void"
    unused = "".join(f"(void)p{number};" for number in range(len(declared)))
    if "char" in returned and "*" in returned:
        return f'const char *{name}({arguments}) {{ {unused} return "simulated"; }}\n'
    return f"long {name}({arguments}) {{ NOTE({name}) {unused} {' '.join(body)} return 0; }}\n"
