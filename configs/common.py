"""Defaults that all data sets share; a field's comment is its documentation."""

import importlib
import importlib.util

from ml_collections import ConfigDict, FieldReference

from configs.methods import cgs


def parse(arg: str | None, **defaults: str) -> dict[str, str]:
    """'method=cgs,labelled=3' -> {'method': 'cgs', 'labelled': '3'} over `defaults`."""
    options = dict(defaults)
    for pair in filter(None, (arg or "").split(",")):
        key, _, value = pair.partition("=")
        if key not in options or not value:
            raise ValueError(f"config argument {pair!r}: write {', '.join(options)} as NAME=VALUE")
        if defaults[key].isdecimal() and not value.isdecimal():
            raise ValueError(f"config argument {pair!r}: {key} is a number")
        options[key] = value
    return options


def begin(arg: str | None, **defaults: str) -> tuple[ConfigDict, dict[str, str]]:
    """The common config by the argument of a config file, and all that the argument says: method,
    base and model, and what the file has in `defaults`."""
    options = parse(arg, method="cgs", base="", model="unet", **defaults)
    return get_config(options["method"], options["base"], options["model"]), options


def labelled_only(config: ConfigDict, strong: bool = False) -> dict[str, object]:
    """Fields of a row of a sweep with labelled slices alone, as many a step as `config` has of both
    kinds; `strong`: with the augmentation of the semi-supervised methods."""
    slices = config.batch.labelled + config.batch.unlabelled
    augmented = {"method.jitter": True, "method.cutmix": 1.0} if strong else {}
    return {"batch.labelled": slices, "batch.unlabelled": 0} | augmented


def without_specialists(config: ConfigDict) -> dict[str, object]:
    """Fields of a row of a sweep, of the row's own `config`, with CGS without specialists: its
    generalist learns from the teacher by one term instead of three, so by three times the weight,
    and unlabelled images weigh as much against labelled ones as in CGS."""
    return {
        "method.specialists": False,
        "method.terms": ("G_from_g",),
        "method.lambda_max": 3 * config.method.lambda_max,
    }


def weigh_pseudo_labels(config: ConfigDict, weight: float) -> None:
    """Sets `lambda_max` of CGS, by itself or over another method, if it is there."""
    section = config.method if config.method.name == "cgs" else config.get("cgs")
    if section:
        section.lambda_max = weight


def get_config(method: str, base: str = "", model: str = "unet") -> ConfigDict:
    """Common fields with those of configs/models/<model>.py and configs/methods/<method>.py laid
    over.

    With `base`, CGS is laid over that method, which `config.method` then is; CGS has `config.cgs`.
    """
    if base and method != "cgs":
        raise ValueError(f"config argument base={base}: it goes with method=cgs")
    config = ConfigDict()
    config.seed = 0
    config.total_steps = 30_000
    config.log_every = 50
    config.eval_every = 500  # validation and checkpoint
    config.eval_batch = 32  # slices, or windows of them, or of volumes
    # slices of training cases with withheld labels, to measure pseudo-labels on; 0: none
    config.pseudo_slices = 64
    config.test = True  # score the test cases, too; False while a recipe is being chosen

    config.batch = ConfigDict()
    config.batch.labelled = 12  # slices a step, over all devices
    config.batch.unlabelled = 12

    config.model = ConfigDict()
    config.model.name = model  # a file of cgs_jax/models
    config.model.dtype = "float32"  # of the feature maps; or 'bfloat16'
    config.model.head_classes = 3  # background, organ, remaining; or 2: the organ and all else
    config.model.head_depth = 1  # hidden layers of a specialist
    config.model.head_group = 0  # specialists that share a convolution; 0: the best of the platform
    # where the hidden maps of all specialists have more bytes, they are made for a few images at a
    # time, and again for the gradient, which saves memory; 0: the best of the platform
    config.model.head_bytes = 0
    config.model.weights = ""  # file to start from, of a kind that the backbone reads

    # before each validation the statistics of batch norm are averaged over so many batches, without
    # dropout; 0: running averages, which remember some ten batches
    config.precise_bn = 0

    config.mesh = ConfigDict()
    config.mesh.data = -1  # devices that share a batch; -1: all that 'space' leaves
    config.mesh.space = 1  # devices that share the rows of an image
    config.mesh.shard_params = 0  # split arrays of at least so many values over 'data'; 0: none

    config.optimizer = ConfigDict()
    config.optimizer.name = "sgd"  # or 'adamw'
    config.optimizer.lr = 0.01
    config.optimizer.momentum = 0.9  # of the gradient
    config.optimizer.momentum_squares = 0.999  # of its square, which only 'adamw' averages
    config.optimizer.weight_decay = 1e-4
    config.optimizer.power = 0.9  # lr (1 - t/T)^power

    config.augment = ConfigDict()
    # probability of a mirror image (rot90^k, then a flip); 0 where left and right differ; 'auto': 0
    # where names of organs tell one side from the other, else .5
    config.augment.flip = FieldReference(0.5, field_type=object)
    config.augment.rotate = 0.5  # else: probability of a rotation
    config.augment.degrees = 20.0
    config.augment.jitter = 0.8  # probability of brightness and contrast in the strong view
    config.augment.strength = 0.5  # each factor is uniform in 1 +- strength

    config.inference = "generalist"  # or 'specialists': their merged scores; or 'both'
    # of a method with a teacher: 'student' or 'teacher'; '': whom the method's authors let predict
    config.predict_with = ""
    config.combine = "average"  # of several predictions; or 'confidence', the surest, or 'vote'
    # windows of so many pixels a side decide together where slices are larger; 0: whole slices, or
    # with data.spacing and in volumes windows of data.patch
    config.window = 0
    # back to the grid of the scan: probabilities, 'linear'; or labels, 'nearest', as the literature
    config.upsample = "linear"
    config.largest_component = False  # keep only the largest piece of every organ of a scan
    config.method = ConfigDict({"name": base or method})
    # share of total_steps in which the weight of unlabelled images rises; 0: it does not
    config.method.ramp = 1.0
    config.data = ConfigDict()
    config.data.root = "data"  # folder of the data set
    config.data.cache = ""  # prepared data; '' means ROOT/cgs_cache
    config.data.channels = 1  # of an image
    # in label files: numbers of the organs, () if they are 1, 2, ...; and of voxels that nobody
    # annotated, 0 if there are none
    config.data.numbers = ()
    config.data.ignore = 0
    # what is scored in place of each organ: (name, its organs counted from 1), and so on
    config.data.regions = ()
    config.data.partial = False  # some cases are annotated for some organs only; found in the files
    config.data.size = 256  # slices are resized to size x size, nearest neighbour
    # intensities to [0, 1]: 'percentile' (0.5 and 99.5) or 'minmax' of each scan, or (low, high);
    # 'auto' is a window for CT, else 'percentile'
    config.data.normalise = FieldReference("percentile", field_type=object)
    # True: a label of its scan's shape lies on it, even where their affines say another place
    config.data.trust_shapes = False
    # instead of squares: pixels of so many millimetres, or 'median', as the scans have; 0: squares
    config.data.spacing = FieldReference(0, field_type=object)
    # of volumes: millimetres from slice to slice, or 'median'; 0: the slices that there are
    config.data.slice_spacing = FieldReference(0, field_type=object)
    config.data.depth = 0  # training sees windows of so many slices of volumes; 0: single slices
    config.data.patch = 0  # training sees windows of patch x patch pixels of them; 0: whole slices
    config.data.patch_anywhere = 0.15  # share of the windows that lie anywhere
    config.data.patch_foreground = 0.0  # share of the labelled windows that are centred on an organ
    config.data.patch_spread = 24  # centres of the others: at most so far from the slice's, pixels
    config.data.grow_at = ()  # shares of total_steps, such as (0.5, 0.95), from which on
    config.data.grow_to = ()  # the windows are so wide, such as (160, 0)
    # one slice alone is labelled: 'CASE:SLICE', counted from 0, or 'auto', see docs/own_data.md
    config.data.exemplar = ""
    # False: cases that are annotated for some organs only train without their labels
    config.data.partly_labelled = True
    config.data.splits = ""  # folder of train.txt, val.txt, test.txt; '': published, else random
    config.data.fold = -1  # of nnU-Net's splits_final.json in the root; -1: not by folds
    config.data.split_seed = 0  # of random splits
    config.data.val_fraction = 0.1  # of the patients, where no list says
    config.data.test_fraction = 0.2  # 0: no test cases
    # patient of a case name: its group; here all but what tells scans of one patient apart
    config.data.patient = (
        r"(?i)(.+?)(?:[_-](?:(?:frame|time|visit|phase|session|ses|scan|tp|t)[_-]?\d+|ED|ES))*$"
    )

    # Of an unknown name main lists those that there are.
    for folder, name in (("models", model), ("methods", config.method.name)):
        if name.isidentifier() and importlib.util.find_spec(f"configs.{folder}.{name}"):
            importlib.import_module(f"configs.{folder}.{name}").update(config)
        elif name.isidentifier() and importlib.util.find_spec(f"cgs_jax.{folder}.{name}"):
            raise ValueError(f"{folder[:-1]}={name}: there is no configs/{folder}/{name}.py")
    if base:
        config.cgs = ConfigDict()
        cgs.consistency(config.cgs)
    return config
