"""Policies by name. Another one is a file beside this and an entry here."""

from collections.abc import Callable

from hybridgen.kernels.policies.base import Policy
from hybridgen.kernels.policies.exact import ExactPolicy
from hybridgen.kernels.policies.hybridgen import HybridGenPolicy
from hybridgen.kernels.policies.mass import MassPolicy

# Called with the number of layers and the share of the softmax mass to be attended, which not all can promise.
POLICIES: dict[str, Callable[[int, float], Policy]] = {
    "exact": lambda num_layers, mass: ExactPolicy(),
    "hybridgen": lambda num_layers, mass: HybridGenPolicy(num_layers),
    "mass": lambda num_layers, mass: MassPolicy(num_layers, mass=mass),
}
