"""Prints four facts for FindInstalledTorch.cmake as a CMake list.

torch's version, its folder, its CUDA version or "none", and the include folders of CUDA joined by "|", or "none".
"""

import os
import pathlib

import torch


def cuda_includes():
    candidates = [pathlib.Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"]
    candidates += sorted(pathlib.Path("/usr/local").glob("cuda-*/include"), reverse=True)
    site = pathlib.Path(torch.__file__).parent.parent
    candidates += sorted(site.glob("nvidia/*/include"))
    wanted = ("cuda_runtime_api.h", "crt/host_config.h", "nvrtc.h")
    found = []
    for header in wanted[:2]:
        folder = next((c for c in candidates if (c / header).exists()), None)
        if folder is None:
            return "none"
        if str(folder) not in found:
            found.append(str(folder))
    # cuBLAS, cuSPARSE and cuSOLVER headers, which some of torch's CUDA headers include, come with the wheels too.
    found += [str(c) for c in candidates if (c / "cublas_v2.h").exists() and str(c) not in found][:1]
    return "|".join(found)


print(
    torch.__version__.split("+")[0],
    pathlib.Path(torch.__file__).parent,
    torch.version.cuda or "none",
    cuda_includes() if torch.version.cuda else "none",
    sep=";",
)
