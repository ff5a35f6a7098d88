"""Runs unmodified PyPI ``fairseq==0.12.2`` on Python 3.11-3.14, torch >= 2.6 and NumPy 2, and loads fairseq plugins.

Importing this module installs an import hook and nothing more: neither torch nor fairseq is imported until the program
imports fairseq. ``fairseq_compat.pth`` imports it at interpreter start-up, so that ``fairseq-train`` and the others
just work; where no ``.pth`` file is read (PYTHONPATH, ``pip --target``), run ``python -m fairseq_compat fairseq-train
...``.

Environment: FAIRSEQ_COMPAT=0             install no hook FAIRSEQ_TRUST_CHECKPOINT=1   load checkpoints that hold
  arbitrary Python objects or expressions (this can run code they name)

A plugin is an entry point in the group ``fairseq.plugins``: a function without arguments that registers models, tasks,
etc.

The hook also tells lm-evaluation-harness, where that is imported, of ``--model momentum_lm``, whose errors are one line
there too.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # this runs at every Python start, and importing typing would take longer than all of it
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType
    from typing import IO, Any, NoReturn, Optional

    from torch import Tensor


# Patches. Each takes the fairseq module that it fixes, just after that module has run.


def _view(module: ModuleType, **names: Any) -> ModuleType:
    """A read-through view of ``module`` with a few names added or replaced, so that only one module sees them."""
    view = type(sys)(module.__name__)
    view.__dict__.update(names)
    view.__getattr__ = lambda name: getattr(module, name)  # type: ignore[method-assign]
    return view


def _numpy_names(module: ModuleType) -> None:
    """NumPy removed ``np.int`` and ``np.float`` in 1.24, ``np.compat`` in 2.0, an argument of ``percentile`` in 2.4."""
    from types import SimpleNamespace

    import numpy

    def percentile(*args: Any, interpolation: Any = "linear", **kwargs: Any) -> Any:
        return numpy.percentile(*args, **{"method": interpolation, **kwargs})

    names = {"int": int, "float": float, "compat": SimpleNamespace(long=numpy.int64), "percentile": percentile}
    module.np = _view(numpy, **names)  # type: ignore[attr-defined]


def _help_made_later(module: ModuleType) -> None:
    """Python 3.14 looks for formats in a flag's help; Hydra 1.3 gives an object that makes its text when shown."""
    import argparse

    class ArgumentParser(argparse.ArgumentParser):
        def _check_help(self, action: argparse.Action) -> None:
            if isinstance(action.help, str):
                super()._check_help(action)  # type: ignore[misc]

    module.argparse = _view(argparse, ArgumentParser=ArgumentParser)  # type: ignore[attr-defined]


def _whole_before_parts(module: ModuleType) -> None:
    """fairseq prefers a part of a checkpoint that lies beside the whole one, whose name was given."""
    import functools

    stock_name = module.get_maybe_sharded_checkpoint_filename

    @functools.wraps(stock_name)
    def checkpoint_filename(filename: str, *args: Any, **kwargs: Any) -> Any:
        return filename if module.PathManager.isfile(filename) else stock_name(filename, *args, **kwargs)

    module.get_maybe_sharded_checkpoint_filename = checkpoint_filename  # type: ignore[attr-defined]


def _checkpoint_loading(module: ModuleType) -> None:
    """torch >= 2.6 refuses the argparse.Namespace in checkpoints of fairseq's older models; this allows
    that, no more.
    """
    import functools

    # Of the call that is under way: how it reads, whether a checkpoint of the trainer, and what will be made of its
    # options.
    mmap, whole = False, False
    building: tuple[str, ...] = ()

    def load(file: IO[bytes], map_location: Any = None) -> dict[str, Any]:
        from momentum_lm.formats.checkpoint import load_checkpoint, trusted
        from momentum_lm.formats.options import check_state

        state = load_checkpoint(file.name, mmap=mmap)  # fairseq only ever maps to the CPU here
        if whole and not trusted():
            check_state(state, file.name)
        return state

    stock_to_cpu = module.load_checkpoint_to_cpu

    @functools.wraps(stock_to_cpu)
    def load_checkpoint_to_cpu(path: Any, arg_overrides: Any = None, load_on_all_ranks: bool = False) -> dict[str, Any]:
        nonlocal mmap, whole
        from momentum_lm.fairseq_plugin.components import check_components
        from momentum_lm.formats.checkpoint import read_by_fairseq, trusted
        from momentum_lm.formats.native import check_fairseq_model

        mmap = load_on_all_ranks  # then all processes of a machine read the one copy that its page cache holds
        whole = True
        try:
            with read_by_fairseq(path):
                state: dict[str, Any] = stock_to_cpu(path, arg_overrides, load_on_all_ranks)
                if not trusted():
                    check_fairseq_model(state)
                    check_components(state.get("cfg"), building)
        finally:
            whole = False
        return state

    stock_ensemble = module.load_model_ensemble_and_task

    @functools.wraps(stock_ensemble)
    def load_model_ensemble_and_task(
        filenames: Any, arg_overrides: Any = None, task: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        nonlocal building
        building = ("model",) if task is not None else ("task", "model")
        try:
            return stock_ensemble(filenames, arg_overrides, task, *args, **kwargs)
        finally:
            building = ()

    _whole_before_parts(module)
    module.torch = _view(module.torch, load=load)  # type: ignore[attr-defined]
    module.load_checkpoint_to_cpu = load_checkpoint_to_cpu  # type: ignore[attr-defined]
    module.load_model_ensemble_and_task = load_model_ensemble_and_task  # type: ignore[attr-defined]


def _checkpoint_writing(module: ModuleType) -> None:
    """fairseq copies checkpoints in place, and retries a failed write where it stopped: both can leave torn files."""
    import functools

    manager, stock_save, stock_copy = module.PathManager, module.torch_persistent_save, module.PathManager.copy
    remote = manager.path_requires_pathmanager

    @functools.wraps(stock_save)
    def save(obj: Any, filename: str, async_write: bool = False) -> None:
        from momentum_lm.files import replace_file

        if remote(filename):
            return stock_save(obj, filename, async_write)
        # An asynchronous write could not be renamed into place when it ends, so it is done here and now.
        return replace_file(filename, lambda file: module.torch.save(obj, file))

    @functools.wraps(stock_copy)
    def copy(src_path: str, dst_path: str, overwrite: bool = False) -> Any:
        import shutil

        from momentum_lm.errors import CheckpointError
        from momentum_lm.files import rename_durably, replace_file

        if remote(src_path) or remote(dst_path):
            return stock_copy(src_path, dst_path, overwrite)
        if os.path.exists(dst_path) and os.path.samefile(src_path, dst_path):
            return dst_path

        def write() -> None:
            with open(src_path, "rb") as source:
                replace_file(dst_path, lambda file: shutil.copyfileobj(source, file, 1 << 24))

        # What damages a file damages it under each of its names, and a run whose last checkpoint is torn goes on from
        # another one: so the last one is a file of its own, where the disk has room for it.
        no_room = None
        if os.path.basename(dst_path).startswith("checkpoint_last"):
            try:
                write()
                return dst_path
            except CheckpointError as error:
                no_room = error
        try:  # one file of two names: checkpoints are replaced, and never written into
            if os.path.lexists(dst_path + ".tmp"):
                os.unlink(dst_path + ".tmp")
            os.link(src_path, dst_path + ".tmp")
            rename_durably(dst_path + ".tmp", dst_path)
        except OSError:  # a file system without links
            if no_room:
                raise no_room from None
            write()
        return dst_path

    module.torch_persistent_save = save  # type: ignore[attr-defined]
    manager.copy = staticmethod(copy)


def _restoring(module: ModuleType) -> None:
    """A checkpoint whose optimizer, schedule, counters or meters are not those of the run is one line that says how to
    do without them.

    (Weights that do not fit fairseq explains itself. Where an exception came from, the log says at the level DEBUG.)
    """
    import functools
    import logging

    stock = module.Trainer.load_checkpoint

    @functools.wraps(stock)
    def load_checkpoint(self: Any, filename: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return stock(self, filename, *args, **kwargs)
        except (LookupError, TypeError, AttributeError, ValueError, AssertionError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            if getattr(error, "user_error", False) or isinstance(error, NotImplementedError) or "memory" in reason:
                raise
            from momentum_lm.errors import CheckpointError

            logging.getLogger("fairseq_compat").debug("%s", filename, exc_info=True)
            raise CheckpointError(
                f"the state of training in {filename} does not fit this run ({type(error).__name__}: {reason}); "
                "to take its weights alone add --reset-optimizer --reset-lr-scheduler --reset-dataloader --reset-meters"
            ) from error

    module.Trainer.load_checkpoint = load_checkpoint


def _dictionary_errors(module: ModuleType) -> None:
    """A ``dict.txt`` that is none is one line that names it, in every task."""
    import functools

    stock = module.Dictionary.add_from_file

    @functools.wraps(stock)
    def add_from_file(self: Any, f: Any) -> None:
        try:
            stock(self, f)
        except FileNotFoundError:
            raise
        except Exception as error:  # fairseq raises that for what is not UTF-8
            if not isinstance(f, str) or getattr(error, "user_error", False):
                raise  # of the same call for an open file
            from momentum_lm.errors import UserError

            raise UserError(f"cannot read the dictionary {f}: {' '.join(str(error).split())[:300]}") from error

    module.Dictionary.add_from_file = add_from_file


def _chosen_task(module: ModuleType) -> None:
    """``--task`` and ``--criterion`` of fairseq-validate change nothing where a checkpoint keeps its options in
    ``cfg``.

    (They do where it keeps them in ``args``, fairseq's older form.) Here they do for tasks with ``for_any_checkpoint =
    True``: the others keep what the checkpoint was trained with. Options of the checkpoint's task stay, for the new
    task to read.
    """
    import functools
    from argparse import Namespace

    stock = module.overwrite_args_by_name

    @functools.wraps(stock)
    def overwrite_args_by_name(cfg: Any, overrides: dict[str, Any]) -> None:
        from fairseq.dataclass.utils import convert_namespace_to_omegaconf
        from fairseq.tasks import TASK_REGISTRY
        from omegaconf import open_dict

        stock(cfg, overrides)
        if getattr(TASK_REGISTRY.get(overrides.get("task")), "for_any_checkpoint", False):
            chosen = convert_namespace_to_omegaconf(Namespace(**{**cfg.task, **overrides}))
            with open_dict(cfg):
                cfg.task, cfg.criterion = chosen.task, chosen.criterion

    module.overwrite_args_by_name = overwrite_args_by_name  # type: ignore[attr-defined]


def _gathering_on_cpu(module: ModuleType) -> None:
    """fairseq-validate in several processes gathers its sums in a GPU's memory, even with ``--cpu``."""
    import functools

    stock = module.all_gather_list

    @functools.wraps(stock)
    def all_gather_list(data: Any, group: Any = None, max_size: int = 16384) -> list[Any]:
        if module.torch.cuda.is_available():
            return stock(data, group, max_size)
        group = group or module.get_global_group()
        gathered: list[Any] = [None] * module.get_world_size(group)
        module.dist.all_gather_object(gathered, data, group)
        return gathered

    module.all_gather_list = all_gather_list  # type: ignore[attr-defined]


def _broadcast(module: ModuleType) -> None:
    """On resuming, rank 0 sends the checkpoint's configuration (omegaconf objects) to the others: no file, and the same
    job.
    """
    import functools

    load = functools.partial(module.torch.load, weights_only=False)
    module.torch = _view(module.torch, load=load)  # type: ignore[attr-defined]


def _isolated_workers(module: ModuleType) -> None:
    """The processes that a command starts, one a device, import nothing from the current folder: it may hold data of
    others.
    """
    import functools

    stock = module.call_main

    @functools.wraps(stock)
    def call_main(*args: Any, **kwargs: Any) -> Any:
        from momentum_lm.system import isolated_children

        with isolated_children():
            return stock(*args, **kwargs)

    module.call_main = call_main  # type: ignore[attr-defined]


def _encoder_mask_type(module: ModuleType) -> None:
    """torch 2's encoder kernel asks what kind of mask it gets. fairseq's encoders give it the padding mask: kind 1."""
    torch = module.torch

    # Written out, and with types, because TorchScript compiles it together with the encoder that calls it.
    def forward(
        x: Tensor, dim: int, heads: int, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, gelu: bool, norm_first: bool,
        eps: float,
        w3: Tensor, b3: Tensor, w4: Tensor, b4: Tensor, w5: Tensor, b5: Tensor, w6: Tensor, b6: Tensor,
        mask: Optional[Tensor] = None,  # noqa: UP045 - as TorchScript reads it
    ) -> Tensor:  # fmt: skip
        kind = 1
        return torch._transformer_encoder_layer_fwd(
            x, dim, heads, w1, b1, w2, b2, gelu, norm_first, eps, w3, b3, w4, b4, w5, b5, w6, b6,
            mask, None if mask is None else kind,
        )  # fmt: skip

    module.torch = _view(module.torch, _transformer_encoder_layer_fwd=forward)  # type: ignore[attr-defined]


def _ddp_on_cpu(module: ModuleType) -> None:
    """DistributedDataParallel rejects ``device_ids`` for a model on the CPU, and newer ones have another name for an
    argument.
    """
    import inspect

    stock = module.DistributedDataParallel
    renamed = "forward_sync_buffers" in inspect.signature(stock).parameters

    def ddp(module: Any, **kwargs: Any) -> Any:
        if next(module.parameters()).device.type == "cpu":
            kwargs.update(device_ids=None, output_device=None)
        if renamed:
            kwargs["forward_sync_buffers"] = kwargs.pop("broadcast_buffers")
        return stock(module=module, **kwargs)

    module.DistributedDataParallel = ddp  # type: ignore[attr-defined]


def _types_of_options(module: ModuleType) -> None:
    """fairseq reads ``Optional[T]`` out of a type's text, which is ``T | None`` from Python 3.14 on."""
    import typing

    def interpret_dc_type(field_type: Any) -> Any:
        if isinstance(field_type, str):
            raise RuntimeError("field should be a type")
        if field_type is typing.Any:
            return str
        members = [t for t in typing.get_args(field_type) if t is not type(None)]
        return members[0] if type(None) in typing.get_args(field_type) else field_type

    module.interpret_dc_type = interpret_dc_type  # type: ignore[attr-defined]


def _nested_groups(module: ModuleType) -> None:
    """fairseq hands groups of arguments to ``add_args``, and some make groups in them: Python 3.14 refuses."""
    import argparse

    def add_argument_group(group: Any, *args: Any, **kwargs: Any) -> Any:
        return group  # its arguments are listed with those of the group around it

    if sys.version_info >= (3, 14):
        kind: Any = argparse._ArgumentGroup
        kind.add_argument_group = add_argument_group


def _forked_loaders(module: ModuleType) -> None:
    """Forked processes load batches, as before Python 3.14: fairseq's datasets cannot be pickled for others."""
    import functools

    if sys.platform != "linux" or sys.version_info < (3, 14):
        return
    stock = module.torch.utils.data.DataLoader

    @functools.wraps(stock, updated=())
    def loader(*args: Any, num_workers: int = 0, **kwargs: Any) -> Any:
        context = {"multiprocessing_context": "fork"} if num_workers else {}
        return stock(*args, num_workers=num_workers, **{**context, **kwargs})

    data = _view(module.torch.utils.data, DataLoader=loader)
    module.torch = _view(module.torch, utils=_view(module.torch.utils, data=data))


def _bleu_in_python(module: ModuleType) -> None:
    """fairseq counts the n-grams of BLEU in a compiled extension; without it, they are counted here."""
    from importlib.util import find_spec

    if find_spec("fairseq.libbleu") is not None:
        return

    def __init__(self: Any, cfg: Any) -> None:
        self.pad, self.eos, self.unk = cfg.pad, cfg.eos, cfg.unk
        self.reset()

    def reset(self: Any, one_init: bool = False) -> None:
        ones = [f"{kind}{order}" for kind in ("match", "count") for order in (2, 3, 4)] if one_init else []
        self.stat = module.BleuStat(**dict.fromkeys(ones, 1))

    def add(self: Any, ref: Any, pred: Any) -> None:
        import torch

        from momentum_lm.fairseq_plugin.compiled import add_bleu_counts

        for name, tokens in (("ref", ref), ("pred", pred)):
            if not isinstance(tokens, torch.IntTensor):
                raise TypeError(f"{name} must be a torch.IntTensor (got {type(tokens)})")
        assert not ref.lt(0).any()
        known = ref.masked_fill(ref.eq(self.unk), -999)  # no word matches an unknown one
        add_bleu_counts(self.stat, known.flatten().tolist(), pred.flatten().tolist(), self.pad, self.eos)

    for method in (__init__, reset, add):
        setattr(module.Scorer, method.__name__, method)


def _options(module: ModuleType) -> None:
    """``--bf16`` turns on ``--tpu`` (fairseq issue 4696); every command takes ``--trust-checkpoint``, and reports an
    error in one line.
    """
    import argparse
    import functools

    stock_parse, stock_parser = module.parse_args_and_arch, module.get_parser

    class Trust(argparse.Action):
        def __call__(self, *args: Any, **kwargs: Any) -> None:
            os.environ["FAIRSEQ_TRUST_CHECKPOINT"] = "1"  # also reaches spawned workers

    @functools.wraps(stock_parser)
    def get_parser(*args: Any, **kwargs: Any) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = stock_parser(*args, **kwargs)
        text = "load checkpoints that hold arbitrary Python objects; this can run code they name"
        parser.add_argument("--trust-checkpoint", action=Trust, nargs=0, dest=argparse.SUPPRESS, help=text)

        def error(message: str) -> NoReturn:
            parser.exit(
                2, f"error: {message}; {parser.prog} --help lists the options\n"
            )  # its usage is a hundred lines

        parser.error = error  # type: ignore[method-assign]
        return parser

    @functools.wraps(stock_parse)
    def parse_args_and_arch(parser: Any, input_args: Any = None, parse_known: bool = False, **kwargs: Any) -> Any:
        result = stock_parse(parser, input_args, parse_known, **kwargs)
        args = result[0] if isinstance(result, tuple) else result
        if getattr(args, "bf16", False):
            args.tpu = "--tpu" in (sys.argv if input_args is None else input_args)
        if getattr(args, "write_checkpoints_asynchronously", False):
            print("warning: --write-checkpoints-asynchronously: ignored, as no such write is atomic", file=sys.stderr)
            args.write_checkpoints_asynchronously = False
        return result

    module.get_parser = get_parser  # type: ignore[attr-defined]
    module.parse_args_and_arch = parse_args_and_arch  # type: ignore[attr-defined]


def _user_dir(module: ModuleType) -> None:
    """fairseq scans a user directory's models/ and tasks/ only; one that has a ``register()`` gets it
    called as well.
    """
    import functools

    stock = module.import_user_module

    @functools.wraps(stock)
    def import_user_module(args: Any) -> None:
        stock(args)
        path = getattr(args, "user_dir", None)
        register = getattr(sys.modules.get(os.path.basename(os.path.abspath(path))), "register", None) if path else None
        if callable(register):
            register()

    module.import_user_module = import_user_module  # type: ignore[attr-defined]


def _quiet(module: ModuleType) -> None:
    """Hides deprecation warnings about fairseq's own use of hydra and torch: its users can do nothing about them."""
    import warnings

    for message in (
        r"(?s).*hydra\.cc/docs",
        "hydra.experimental",
        r"`torch\.cuda\.amp\.autocast",
        "'pin_memory' argument",
    ):
        warnings.filterwarnings("ignore", message=message)


def _user_errors(module: ModuleType) -> None:
    """An uncaught exception with ``user_error`` is shown as one line, also where fairseq's trainer hid it behind a bare
    Exception.
    """
    stock = sys.excepthook

    def excepthook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        reason: BaseException | None = error
        while reason is not None and not getattr(reason, "user_error", False):
            reason = reason.__context__ if type(reason) is Exception else None
        if reason is not None:
            print(f"error: {reason.line()}", file=sys.stderr)  # type: ignore[attr-defined]
        else:
            stock(kind, error, trace)

    sys.excepthook = excepthook


def _plugins(module: ModuleType) -> None:
    """Lets every installed plugin register itself, except one that the command names with --user-dir: that copy is
    wanted.
    """
    import itertools
    from importlib.metadata import entry_points

    words = [*sys.argv, ""]
    user_dirs = set()
    for word, following in itertools.pairwise(words):
        flag, _, value = word.partition("=")
        if flag in ("--user-dir", "common.user_dir"):
            user_dirs.add(os.path.basename(os.path.abspath(value or following)))
    for plugin in entry_points(group="fairseq.plugins"):
        if plugin.module.partition(".")[0] in user_dirs:
            continue
        try:
            plugin.load()()
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            plugin_name = f"fairseq plugin {plugin.name} ({plugin.value})"
            print(f"warning: {plugin_name} failed and is left out: {reason}", file=sys.stderr)


def _harness(module: ModuleType) -> None:
    """lm-evaluation-harness looks for no plugins. Ours is added to its models by name; it is imported when it is
    used.
    """
    from importlib.util import find_spec

    models = getattr(sys.modules.get("lm_eval.api.registry"), "model_registry", None)  # older versions have none
    if models is not None and "momentum_lm" not in models and find_spec("momentum_lm"):
        models.register("momentum_lm", target="momentum_lm.harness.lm_eval:MomentumLM")


_PATCHES: dict[str, tuple[Callable[[ModuleType], None], ...]] = {
    "fairseq": (_quiet, _user_errors, _nested_groups, _plugins),
    "fairseq.utils": (_user_dir,),
    "fairseq.dataclass.utils": (_types_of_options,),
    "fairseq.options": (_options,),
    "hydra._internal.utils": (_help_made_later,),
    "fairseq.checkpoint_utils": (_checkpoint_loading, _checkpoint_writing, _chosen_task),
    "fairseq.trainer": (_restoring,),
    "fairseq.distributed.utils": (_broadcast, _gathering_on_cpu, _isolated_workers),
    "fairseq.models.distributed_fairseq_model": (_ddp_on_cpu,),
    "fairseq.modules.transformer_layer": (_encoder_mask_type,),
    "fairseq.modules.dynamic_crf_layer": (_numpy_names,),
    "fairseq.scoring.bleu": (_bleu_in_python,),
    "fairseq.data.iterators": (_forked_loaders,),
    "fairseq.data.data_utils": (_numpy_names,),
    "fairseq.data.dictionary": (_dictionary_errors,),
    "fairseq.data.language_pair_dataset": (_numpy_names,),
    "fairseq.data.token_block_dataset": (_numpy_names,),
    "lm_eval.models": (_harness, _user_errors),
}


def _hashable_dataclasses(stock: Any) -> Any:
    """Python 3.11 rejects unhashable defaults, and fairseq's configurations are such defaults of one another."""
    if stock.__module__ == __name__:
        return stock  # one fairseq module imports another

    def dataclass(cls: Any = None, /, **kwargs: Any) -> Any:
        def wrap(cls: Any) -> Any:
            cls = stock(cls, **kwargs)
            if cls.__module__.partition(".")[0] == "fairseq" and cls.__hash__ is None:
                cls.__hash__ = object.__hash__
            return cls

        return wrap if cls is None else wrap(cls)

    return dataclass


def _plain_value(text: str) -> Any:
    """What fairseq's modules get for ``eval``. (momentum_lm is imported when it is needed: --user-dir may name another
    copy.)
    """
    from momentum_lm.untrusted import plain_value

    return plain_value(text)


def _as_fairseq_needs(execute: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
    """``execute``, a loader's, with what fairseq's modules need while they run."""

    def run(module: ModuleType) -> None:
        import dataclasses

        import torch  # noqa: F401  (first, so that as little as possible picks up the replacement below)

        stock = dataclasses.dataclass
        dataclasses.dataclass = _hashable_dataclasses(stock)
        vars(module)["eval"] = _plain_value  # the name that the module's functions find
        try:
            execute(module)
        finally:
            dataclasses.dataclass = stock

    return run


# What fairseq compiles and can do without: the functions of momentum_lm.fairseq_plugin.compiled by their names there.
_COMPILED = {
    "fairseq.data.token_block_utils_fast": {
        "_get_slice_indices_fast": "slice_indices",
        "_get_block_to_dataset_index_fast": "block_to_dataset_index",
    },
    "fairseq.data.data_utils_fast": {
        "batch_by_size_vec": "batch_by_size_vec",
        "batch_by_size_fn": "batch_by_size_fn",
        "batch_fixed_shapes_fast": "batch_fixed_shapes",
    },
}


class _NumpyForms:
    """Loads a module of _COMPILED."""

    def create_module(self, spec: Any) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        from momentum_lm.fairseq_plugin import compiled

        for name, ours in _COMPILED[module.__name__].items():
            setattr(module, name, getattr(compiled, ours))


class _Finder:
    """Finds fairseq's modules, and others that have a patch, as usual, and adds to their execution what is needed
    before and after it.
    """

    fairseq_compat = True

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] != "fairseq" and name not in _PATCHES:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    self.wrap(spec.loader, name)
                return spec
        if name in _COMPILED:
            from importlib.machinery import ModuleSpec

            return ModuleSpec(name, _NumpyForms(), origin="NumPy")  # type: ignore[arg-type]
        return None

    def wrap(self, loader: Any, name: str) -> None:
        execute = _as_fairseq_needs(loader.exec_module) if name.partition(".")[0] == "fairseq" else loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            for patch in _PATCHES.get(name, ()):
                patch(module)

        loader.exec_module = exec_module


def install() -> None:
    """Puts the hook in place, once, unless FAIRSEQ_COMPAT=0."""
    if os.environ.get("FAIRSEQ_COMPAT") != "0" and not any(hasattr(f, "fairseq_compat") for f in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def main(argv: list[str]) -> Any:
    """``python -m fairseq_compat fairseq-train ARGS``: runs a fairseq command with the hook in place."""
    import importlib

    command = argv[0].removeprefix("fairseq-").replace("-", "_") if argv else ""
    try:
        module = importlib.import_module(f"fairseq_cli.{command}")
    except ModuleNotFoundError as error:
        if error.name not in ("fairseq_cli", f"fairseq_cli.{command}"):
            raise
        print("usage: python -m fairseq_compat fairseq-{train,validate,eval-lm,preprocess,...} ARGS", file=sys.stderr)
        return 2
    sys.argv = argv
    return module.cli_main()


if __name__ in ("__main__", "__mp_main__"):
    import fairseq_compat  # the one copy that everybody else imports

    if __name__ == "__main__":
        sys.exit(fairseq_compat.main(sys.argv[1:]))
else:
    install()
