"""Several data sets, one network, in the union of their organs.

python -m cgs_jax.main --config configs/collection.py:method=cgs,members=acdc+brain@nnunet \
    --workdir runs/collection --config.data.root=FOLDER

`members` are files of configs, with `NAME@` before one the member's own name, without it the
file's. The folder of a member is FOLDER/NAME, unless --config.data.members.NAME.root says another.
Its other options are --config.data.members.NAME.labelled and so on, as its config file has them,
but `size`, `spacing` and `slice_spacing`: unless they are given, slices become data.size squares.
"""

import importlib

from ml_collections import ConfigDict

from configs import common

# What is the collection's alone; what it and its members have. All else is each member's own.
WINDOWS = (
    "depth", "patch", "patch_anywhere", "patch_foreground", "patch_spread", "grow_at", "grow_to",
)  # fmt: skip
OF_ALL = ("name", "root", "cache", "classes", "channels", "partial", "size")


def get_config(arg=None):
    config, options = common.begin(arg, members="acdc+segthor")
    for field in set(config.data) - {*WINDOWS, *OF_ALL}:
        del config.data[field]
    config.data.name = "collection"
    config.augment.flip = "auto"
    config.data.classes = ()  # of all members
    config.data.channels = 0  # as all members have
    config.data.members = ConfigDict()
    for member in options["members"].split("+"):
        name, _, file = member.rpartition("@")
        name = name or file
        if name in config.data.members:
            raise ValueError(f"config argument members: {name} is there twice; write NAME@{file}")
        if not name.isidentifier():
            raise ValueError(f"config argument members: {name!r} must be letters, digits and _")
        if file in ("common", "collection"):
            raise ValueError(f"config argument members: configs/{file}.py is no data set")
        try:
            data = importlib.import_module(f"configs.{file}").get_config().data
        except (ImportError, AttributeError):  # such as the folder configs/methods
            raise ValueError(f"config argument members: there is no configs/{file}.py") from None
        own = ConfigDict({field: data.get_ref(field) for field in data if field not in WINDOWS})
        own.file = file
        own.root = ""  # FOLDER/NAME
        own.size = 0  # that of the collection, data.size
        own.spacing = own.slice_spacing = 0
        config.data.members[name] = own
    return config
