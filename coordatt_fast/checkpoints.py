"""Checkpoints of the authors' MobileNetV2, and of code after it, for models with CoordAtt's names, and back.

The authors' article names the gates' convolutions conv_h and conv_w; their released network, and its
checkpoint, conv2 (rows, h) and conv3 (columns, w).
"""

from collections.abc import Mapping

from torch import Tensor, nn

_RELEASED = {"conv2": "conv_h", "conv3": "conv_w"}
_PUBLISHED = {published: released for released, published in _RELEASED.items()}
_WRAPPERS = ("module", "_orig_mod")


def from_released(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """state with conv2 and conv3 of every attention block renamed to conv_h and conv_w.

    A block is where conv1, bn1, conv2 and conv3 stand side by side, with weights of shapes [m, C, 1, 1] for
    conv1 and [C, m, 1, 1] for the other two; other keys of these names stay. Prefixes that nn.DataParallel,
    DistributedDataParallel and torch.compile add are taken off. The tensors are not copied; order stays.
    ValueError where a new name is already taken.
    """
    return _renamed(state, _RELEASED)


def to_released(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reverse of from_released: conv_h and conv_w of every attention block become conv2 and conv3."""
    return _renamed(state, _PUBLISHED)


def load(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Loads state, under either naming and with or without wrappers' prefixes, into model.

    model may itself be wrapped, accelerated, or be of either naming. RuntimeError, before anything is
    changed, when keys are missing or unexpected or shapes differ: it names them all.
    """
    own = {strip_wrappers(key): (key, value) for key, value in model.state_dict().items()}
    spellings = [dict(_stripped(state)), from_released(state), to_released(state)]
    names = max(spellings, key=lambda spelling: len(own.keys() & spelling.keys()))
    problems = [f"missing {key}" for key in own if key not in names]
    problems += [f"unexpected {key}" for key in names if key not in own]
    for key, (_, value) in own.items():
        have, wanted = list(names.get(key, value).shape), list(value.shape)
        if have != wanted:
            problems.append(f"{key} has shape {have}, the model's has {wanted}")
    if problems:
        raise RuntimeError("the checkpoint does not fit the model: " + "; ".join(problems))
    model.load_state_dict({own[key][0]: value for key, value in names.items()}, strict=True)


def strip_wrappers(key: str) -> str:
    """key without the parts that nn.DataParallel, DistributedDataParallel and torch.compile put first."""
    while key.partition(".")[0] in _WRAPPERS and "." in key:
        key = key.partition(".")[2]
    return key


def _stripped(state: Mapping[str, Tensor]):
    return ((strip_wrappers(key), value) for key, value in state.items())


def _renamed(state: Mapping[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    plain = dict(_stripped(state))
    blocks = {prefix for prefix in _prefixes(plain) if _is_block(plain, prefix, names)}
    result = {}
    for key, value in plain.items():
        prefix, child, leaf = _parted(key)
        if child in names and prefix in blocks:
            key = f"{prefix}{names[child]}.{leaf}"
        if key in result or (key in plain and plain[key] is not value):
            raise ValueError(f"{key} is in the checkpoint under both names")
        result[key] = value
    return result


def _parted(key: str) -> tuple[str, str, str]:
    """"features.3.conv.6.conv2.weight" as ("features.3.conv.6.", "conv2", "weight")."""
    rest, _, leaf = key.rpartition(".")
    prefix, dot, child = rest.rpartition(".")
    return prefix + dot, child, leaf


def _prefixes(state: Mapping[str, Tensor]) -> set[str]:
    return {_parted(key)[0] for key in state}


def _is_block(state: Mapping[str, Tensor], prefix: str, names: dict[str, str]) -> bool:
    wanted = [f"{prefix}{child}.weight" for child in ("conv1", *names)]
    if not {f"{prefix}bn1.weight", *wanted} <= state.keys():
        return False
    weights = [state[name] for name in wanted]
    if any(w.dim() != 4 for w in weights):
        return False
    m, c, *size = weights[0].shape
    return size == [1, 1] and all(tuple(w.shape) == (c, m, 1, 1) for w in weights[1:])
