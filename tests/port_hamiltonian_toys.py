"""The port-Hamiltonian rule in all its variants, also those that do without some part of it."""

import pytest
import rule_toys

# what no coordinate of a tensor has for itself: its friction, its port gain, the scale of its effort, its small size
WITHOUT = {
    "constant friction": {"friction": "constant", "modes": 3},
    "constant port": {"port": "constant"},
    "constant friction and port, coordinatewise": {"friction": "constant", "port": "constant", "coordinatewise": True},
    "tensor normalization": {"normalization": "tensor", "memory": 1},
    "ratio floor": {"ratio_floor": 0.9},
    "tensor normalization, network": {"normalization": "tensor", "mass": "network", "port": "constant"},
}
VARIANTS = rule_toys.VARIANTS | WITHOUT
NEEDS_Q = [name for name, options in VARIANTS.items() if "network" in options.values()]
COORDINATEWISE = [name for name, options in VARIANTS.items() if options.get("coordinatewise")]

over_variants = pytest.mark.parametrize("variant", VARIANTS)


def port_hamiltonian(variant="default", **options):
    return rule_toys.port_hamiltonian("default", **(VARIANTS[variant] | options))
