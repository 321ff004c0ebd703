"""Another router in any model."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "probe": [
            "MoELayer", "MoELayers", "moe_layers",
        ],
        "patch": [
            "Certificate", "Patch", "route", "families", "tiny_family", "family_table",
        ],
    },
)
