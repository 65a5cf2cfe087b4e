"""Networks with the weights that the authors of BoltzNCE published (github.com/RishalAggarwal/BoltzNCE)."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from boltznce.errors import UserError
from boltznce.networks.gvp import GVPVectorField

__all__ = ["load_published_vector_field"]

# their name of a module -> ours; {i} is the number of a layer
MODULES = {
    "initial_embedding.0": "embedding",
    "convs.{i}.edge_message.0": "layers.{i}.message",
    "convs.{i}.node_update.0": "layers.{i}.update",
    "convs.{i}.node_position_update": "layers.{i}.step",
    "convs.{i}.message_layer_norm.feat_norm": "layers.{i}.message_norm",
    "convs.{i}.update_layer_norm.feat_norm": "layers.{i}.update_norm",
    "position_updater.gvps.0": "head",
}
# their name of a parameter within a perceptron -> ours; matrices named W* act from the right
PARAMETERS = {
    "Wh": "hidden.weight",
    "Wu": "vectors.weight",
    "to_feats_out.0.weight": "scalars.weight",
    "to_feats_out.0.bias": "scalars.bias",
    "to_feats_out.1.beta": "activation.beta",
    "scalar_to_vector_gates.weight": "gate.weight",
    "scalar_to_vector_gates.bias": "gate.bias",
    "weight": "weight",
    "bias": "bias",
}
EMPTY = "dropout.vector_dropout.dummy_param"  # a parameter of no elements in every layer of theirs


def load_published_vector_field(path: str | Path) -> GVPVectorField:
    """The GVP vector field of a published state dict (a ``.pt`` file), its sizes read off the shapes.

    Lengths are Å for the alanine-dipeptide file, whose methyls have their carbon before its hydrogens.

    Raises:
        UserError: the file is missing, is no plain state dict, or belongs to another architecture.
    """
    path = Path(path)
    theirs = read_state_dict(path)
    try:
        ours, sizes = translate(theirs)
        network = GVPVectorField(**sizes)
        network.load_state_dict(ours)
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        detail = str(error).splitlines()[-1].strip()
        raise UserError(
            f"{path} does not hold the weights of a published GVP vector field ({detail}); "
            "give the file of such a network, for instance trained_vector_5_layer_ot_ema.pt."
        ) from error
    return network.eval()


def read_state_dict(path: Path) -> Mapping[str, Tensor]:
    """Tensors by name, on the CPU; nothing in the file is executed."""
    if not path.is_file():
        raise UserError(f"There is no weights file {path}; give the path of a downloaded .pt file.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler, the zip reader and the storage reader each raise their own kinds
        raise UserError(f"{path} is not a readable PyTorch weights file; download it again.") from error
    if not isinstance(state, Mapping) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise UserError(f"{path} does not hold a plain state dict (tensors by name); save model.state_dict() alone.")
    return state


def translate(theirs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Our state dict and the constructor's sizes; raises KeyError for a name that has no place here."""
    n_scalars, inputs = theirs["initial_embedding.0.weight"].shape
    hidden, n_vectors = theirs["convs.0.edge_message.0.Wu"].shape
    n_layers = 1 + max(int(name.split(".")[1]) for name in theirs if name.startswith("convs."))
    sizes = {
        "n_features": inputs - 1,
        "n_layers": n_layers,
        "n_scalars": n_scalars,
        "n_vectors": n_vectors,
        "n_kernels": theirs["convs.0.edge_message.0.to_feats_out.0.weight"].shape[1] - n_scalars - hidden,
    }
    without_effect = f"convs.{n_layers - 1}.node_position_update."  # moves positions that nothing reads any more
    ours = {}
    for name, tensor in theirs.items():
        if name.startswith(without_effect) or (name.endswith(EMPTY) and tensor.numel() == 0):
            continue
        ours[our_name(name)] = tensor.T if name.endswith((".Wh", ".Wu")) else tensor
    return ours, sizes


def our_name(name: str) -> str:
    """Our name of their parameter."""
    number = re.match(r"convs\.(\d+)\.", name)
    for module, our_module in MODULES.items():
        if number:
            module, our_module = module.replace("{i}", number[1]), our_module.replace("{i}", number[1])
        rest = name.removeprefix(module + ".")
        if rest != name and rest in PARAMETERS:
            return f"{our_module}.{PARAMETERS[rest]}"
    raise KeyError(f"unknown parameter {name}")
