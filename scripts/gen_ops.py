#!/usr/bin/env python3
"""Writes the tables of typed routes (csrc/aten/register.h) into the build tree, from the installed torch.

The list is every aten overload with a CPU or CUDA kernel in the operator table that torch ships (torchgen's packaged
native_functions.yaml), plus WHOLE and FLAGGEMS below. Overloads whose at::_ops struct the installed headers lack are
left out; they reach the boxed fallback.

    gen_ops.py --out DIR --units N     writes ops_<i>.cc and ops_all.cc, only where the content changed
"""

import argparse
import pathlib
import re

import torch
import torchgen
from torchgen.gen import parse_native_yaml
from torchgen.model import DispatchKey

# Operators that torch composes of others and that are hot: served whole, one relabelling replaces several dispatches.
WHOLE = """
_to_copy clone zeros_like ones_like full_like zeros ones full arange arange.start repeat stack embedding
select_backward slice_backward rsub.Tensor rsub.Scalar add.Scalar sub.Scalar mul.Scalar div.Scalar
add_.Scalar sub_.Scalar mul_.Scalar div_.Scalar new_zeros new_full new_ones masked_fill.Scalar masked_fill.Tensor
mean logsumexp _convolution convolution_backward mode.values conj_physical_ _lazy_clone
""".split()

# Ours by hand (csrc/aten/*.cc): registered before the tables, listed here only to save their compilation.
OURS = set(
    """
empty.memory_format empty_strided _copy_from _copy_from_and_resize copy_ _has_compatible_shallow_copy_type record_stream
as_strided view _reshape_alias unfold
""".split()
)


# Operators that FlagGems has functions for. Those that torch composes of others get a route too, so that one can serve
# them whole; without a wish for that, torch's composition does.
FLAGGEMS = pathlib.Path(__file__).parent.parent / "torch_fl/flaggems/ops_5.0.2.txt"


def table():
    """(name, struct name, header stem, whole, takes a device, composed) of every typed route."""
    packaged = pathlib.Path(torchgen.__file__).parent / "packaged/ATen/native"
    parsed = parse_native_yaml(str(packaged / "native_functions.yaml"), str(packaged / "tags.yaml"))
    headers = pathlib.Path(torch.__file__).parent / "include/ATen/ops"
    by_name = {function.func.name: function for function in parsed.native_functions}

    def has_native_kernel(function):
        # A structured overload's kernel is registered under its out= sibling.
        kernel = by_name[function.structured_delegate] if function.structured_delegate else function
        return any(parsed.backend_indices[key].has_kernel(kernel) for key in (DispatchKey.CPU, DispatchKey.CUDA))

    def composite(function):
        return (
            function.has_composite_explicit_autograd_kernel
            or function.has_composite_explicit_autograd_non_functional_kernel
        )

    flaggems = set(FLAGGEMS.read_text().split())
    rows = []
    for function in parsed.native_functions:
        name = str(function.func.name)
        native = has_native_kernel(function)
        composed = name in flaggems and not native and composite(function)
        if name in OURS or not (native or name in WHOLE or composed):
            continue
        struct = function.func.name.unambiguous_name()
        stem = function.root_name
        header = headers / f"{stem}_ops.h"
        declared = header.exists() and re.search(rf"struct TORCH_API {struct} ", header.read_text())
        if declared:
            device = any("Device" in str(argument.type) for argument in function.func.arguments.flat_all)
            rows.append((name, struct, stem, name in WHOLE, device, composed))
    return sorted(rows)


def write(path: pathlib.Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def unit(index: int, rows) -> str:
    includes = "\n".join(sorted({f"#include <ATen/ops/{stem}_ops.h>" for _, _, stem, *_ in rows}))
    body = "\n".join(
        f"    {'composed' if composed else 'typed'}_route<at::_ops::{struct}>"
        f'("{name}", {str(whole).lower()}, {str(device).lower()}),'
        for name, struct, _, whole, device, composed in rows
    )
    return (
        f'// Written by scripts/gen_ops.py.\n#include "csrc/aten/register.h"\n{includes}\n\nnamespace flagos {{\n'
        f"static const TypedRoute rows[] = {{\n{body}\n}};\n"
        f"extern const TypedRoutes typed_routes_{index} = {{rows, sizeof(rows) / sizeof(rows[0])}};\n}}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--units", type=int, required=True)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = table()
    for index in range(arguments.units):
        write(arguments.out / f"ops_{index}.cc", unit(index, rows[index :: arguments.units]))
    declarations = "\n".join(f"extern const TypedRoutes typed_routes_{i};" for i in range(arguments.units))
    members = ", ".join(f"typed_routes_{i}" for i in range(arguments.units))
    write(
        arguments.out / "ops_all.cc",
        '// Written by scripts/gen_ops.py.\n#include "csrc/aten/register.h"\n\nnamespace flagos {\n'
        f"{declarations}\nconst std::vector<TypedRoutes>& typed_routes() {{\n"
        f"  static const std::vector<TypedRoutes> all{{{members}}};\n  return all;\n}}\n}}\n",
    )
    print(f"gen_ops: {len(rows)} typed routes in {arguments.units} units (torch {torch.__version__})")


if __name__ == "__main__":
    main()
