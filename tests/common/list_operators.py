"""Every in-place operator of torch on lists of tensors, with arguments for it made from its schema."""

import torch


def operators() -> dict[str, torch._ops.OpOverload]:
    """`_foreach_add_.Scalar` and all others that change the members of a list."""
    found = {}
    for full in sorted(torch._C._dispatch_get_all_op_names()):
        name, _, overload = full.partition(".")
        if not name.startswith("aten::_") or not name.endswith("_"):
            continue
        operator = getattr(getattr(torch.ops.aten, name[6:]), overload or "default")
        first = operator._schema.arguments[0]
        if str(first.type) == "List[Tensor]" and first.alias_info is not None and first.alias_info.is_write:
            found[full[6:]] = operator
    return found


def arguments(operator, device: str, dtype: torch.dtype = torch.float32) -> tuple[list, dict]:
    """(positional, keyword) arguments: lists have two members."""
    positional, keyword = [], {}
    for argument in operator._schema.arguments:
        kind = str(argument.type)
        if kind == "List[Tensor]":
            # A step is a number; scales and results of checks are float32 whatever the members are.
            shapes = [(), ()] if argument.name == "state_steps" else [(3,), (2, 2)]
            value = [torch.ones(s, device=device).to(torch.float32 if s == () else dtype) for s in shapes]
        elif kind == "Tensor" and argument.name == "scalars":
            value = torch.tensor([2, 3], dtype=dtype)  # read by the host
        elif kind == "Tensor":
            single = argument.name in ("found_inf", "inv_scale", "lr")
            value = torch.ones((), device=device, dtype=torch.float32 if single else dtype)
        elif argument.has_default_value():
            continue
        elif "List" in kind:
            value = [2.0, 3.0]
        else:
            value = {"bool": argument.name == "amsgrad", "float": 0.5}.get(kind, 2)
        if argument.kwarg_only:
            keyword[argument.name] = value
        else:
            positional.append(value)
    return positional, keyword
