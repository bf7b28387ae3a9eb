"""One decorator for all components: one image that holds raresynth, nothing installed at run time."""

import functools
import os

from kfp import dsl

IMAGE = os.environ.get("RARESYNTH_IMAGE", "raresynth-train-python:latest")
"""Image of every component, read when the pipeline is compiled."""

component = functools.partial(dsl.component, base_image=IMAGE, packages_to_install=[], install_kfp_package=False)
