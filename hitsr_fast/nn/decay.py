"""Which parameters weight decay draws to zero: told by the type of the module that has them."""

from __future__ import annotations

from torch import nn

_MATRICES = (
    nn.Linear,
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
_PLAIN = (
    nn.Embedding,
    *(nn.LayerNorm, nn.RMSNorm, nn.GroupNorm),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
)


def weight_decay_groups(model: nn.Module) -> tuple[list[str], list[str]]:
    """Names of the parameters that decay, and of those that do not.

    The weights of linear layers and convolutions decay. Biases, norms and embeddings do not, nor what a class
    lists in its attribute `undecayed`, the names of parameters of its own: positions, start tokens, the
    factor of the scores, codebook and phi.

    Args:
        model: Any; what is frozen is listed too.

    Returns:
        Two lists in the order of `model.named_parameters()`, with each of its names in one of them.

    Raises:
        TypeError: A parameter's module is of no type that is known here, and its class does not list it.

    Notes:
        Source: VAR (arXiv 2404.02905), the parameter groups of its released trainer, which tells by names.

    Example:
        >>> weight_decay_groups(nn.Sequential(nn.Embedding(4, 2), nn.Linear(2, 2)))
        (['1.weight'], ['0.weight', '1.bias'])
    """
    kinds: dict[int, bool] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(path, recurse=False):
            kinds.setdefault(id(parameter), _decays(module, name))
    groups: tuple[list[str], list[str]] = ([], [])
    for name, parameter in model.named_parameters():
        groups[0 if kinds[id(parameter)] else 1].append(name)
    return groups


def _decays(module: nn.Module, path: str) -> bool:
    """Whether a module's own parameter decays; `path` is its name in the model."""
    name = path.rpartition(".")[2]
    if name in getattr(type(module), "undecayed", ()):
        return False
    if isinstance(module, _MATRICES) and name in ("weight", "bias"):
        return name == "weight"
    if isinstance(module, _PLAIN):
        return False
    kind = type(module).__name__
    raise TypeError(
        f"{path}: expected a parameter of a linear layer, a convolution, a norm or an embedding, or one that "
        f"its class lists in `undecayed`; found one of {kind}"
    )
