"""One decorator for all components: one image that holds raresynth, nothing installed at run time."""

import functools

from kfp import dsl

component = functools.partial(
    dsl.component,
    base_image="raresynth-train",  # the cluster's params name the one to take: pipelines/placement.py
    packages_to_install=[],
    install_kfp_package=False,
)
