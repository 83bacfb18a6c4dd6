"""What `auto` becomes: by rule, by timing, as the run began; and what cannot be had here."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from test_train import DENSE, assert_bitwise_equal, final, interrupt_after

from bagssl_fast import _C, cli, machine, ops, train
from bagssl_fast.augment import Augment
from bagssl_fast.config import BagConfig, Config, EncoderConfig, HeadConfig, LoaderConfig
from bagssl_fast.distributed.ranks import Ranks
from bagssl_fast.losses import build_loss
from bagssl_fast.models.bag_model import build_model
from bagssl_fast.training import checkpoint, choices
from bagssl_fast.training.choices import KEPT, LONG, TIMED, Choices, choose, compiled_or_eager
from bagssl_fast.training.run import example
from bagssl_fast.training.step import no_trace, trial

BF16 = frozenset({"avx2", "avx512bw", "avx512_bf16"})
TIMM = Config(encoder=EncoderConfig("vit_tiny_patch16_224"))


def never() -> tuple[bool, str]:
    raise AssertionError("timed where nothing needs it")


def chosen(config=None, kept=None, steps=10 * LONG, timing=never, me=None) -> Choices:
    return choose(config or Config(), me or Ranks(), kept, steps, timing)


@pytest.fixture(autouse=True)
def without_bf16(monkeypatch):
    """Whatever machine the tests run on."""
    monkeypatch.setattr(machine, "cpu_flags", lambda: frozenset({"avx2"}))


@pytest.fixture
def with_bf16(without_bf16, monkeypatch):
    monkeypatch.setattr(machine, "cpu_flags", lambda: BF16)


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ("sse2 avx2 avx512bw avx512_bf16", "AVX-512 with bf16"),
        ("sse2 avx2 avx512bw avx512_bf16 amx_bf16", "AVX-512 with bf16 and AMX"),
        ("sse2 avx2 avx512bw", "AVX-512"),
        ("sse2 avx2", "AVX2"),
        ("sse2", "SSE2"),
        ("asimd bf16", "NEON with bf16"),
        ("", "unknown vectors"),
    ],
)
def test_instruction_sets(flags, name):
    assert machine.instruction_set(frozenset(flags.split())) == name


class TestPrecision:
    def test_a_cpu_without_bf16_takes_fp32(self):
        found = chosen()
        assert found.precision == "fp32" and "does not compute bf16" in str(found)

    @pytest.mark.parametrize(("faster", "precision"), [(True, "bf16"), (False, "fp32")])
    def test_a_cpu_with_bf16_takes_the_faster_and_says_both_times(
        self, with_bf16, faster, precision
    ):
        found = chosen(timing=lambda: (faster, "fp32 9 ms, bf16 5 ms"))
        assert found.precision == precision and "fp32 9 ms, bf16 5 ms" in str(found)

    def test_short_runs_are_not_timed(self, with_bf16):
        assert chosen(steps=TIMED - 1).precision == "fp32"

    def test_what_is_asked_for_is_taken(self):
        assert chosen(Config(precision="bf16")).precision == "bf16"
        assert "precision" not in chosen(Config(precision="fp32")).why

    def test_a_gpu_that_computes_bf16(self, monkeypatch):
        on_gpu = Ranks(device=torch.device("cuda"))
        for supported, precision, dtype in (
            (True, "bf16", "bfloat16"),
            (False, "fp32", "float32"),
        ):
            monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda s=supported, **_: s)
            found = chosen(me=on_gpu)
            assert (found.precision, found.dtype, found.compile) == (precision, dtype, True)


class TestCompile:
    def test_long_runs_of_other_encoders_are_compiled(self):
        assert chosen(TIMM).compile
        assert not chosen(TIMM, steps=LONG - 1).compile
        # A graph saves launches, compiled code passes over memory: one does not replace the other.
        assert chosen(replace(TIMM, cuda_graph=True)).compile

    @pytest.mark.parametrize("name", ["patchnet", "resnet18"])
    def test_fused_encoders_are_not_on_a_cpu(self, name):
        config = Config(encoder=EncoderConfig(name))
        assert not chosen(config).compile and "fused ops" in chosen(config).why["compile"]
        # As the reference they are torch's own ops.
        assert not chosen(replace(config, precision="bf16")).compile
        with ops.use_impl("reference"):
            assert chosen(replace(config, impl="reference")).compile

    def test_what_is_asked_for_is_taken(self):
        assert chosen(Config(compile=True), steps=1).compile
        assert not chosen(replace(TIMM, compile=False)).compile

    @pytest.mark.parametrize(
        ("flags", "value"),
        [
            (["--compile"], True),
            (["--compile", "yes"], True),
            (["--compile=false"], False),
            (["--compile", "auto"], "auto"),
            ([], "auto"),
        ],
    )
    def test_on_a_command_line(self, flags, value):
        assert cli.parse(["--data", "x", *flags]).compile is value or value == "auto"
        assert cli.parse(["--data", "x", *flags]).compile == value

    def test_wrong_values(self, tmp_path):
        with pytest.raises(ValueError, match="--compile always: expected true or false or auto"):
            cli.parse(["--compile", "always"])
        (tmp_path / "r.yaml").write_text("compile: true")
        assert cli.load(tmp_path / "r.yaml").compile is True


def tiny(name: str, size: int = 16, **options) -> Config:
    return Config(
        batch_size=4,
        bag=BagConfig(patches=3),
        augment=Augment(size=size),
        encoder=EncoderConfig(name, width=8 if name.startswith("patch") else 0, options=options),
        head=HeadConfig(hidden=16, out=8, num_layers=2),
    )


VIT = {"embed_dim": 12, "depth": 1, "num_heads": 2, "patch_size": 8}
ENCODERS = [
    tiny("patchnet"),
    tiny("patchmlp"),
    tiny("resnet50"),
    tiny("vit_tiny_patch16_224", **VIT),
]


def parts(config: Config):
    model = build_model(config).to(memory_format=torch.channels_last)
    return model, build_loss("vicreg"), example(config, Ranks(), torch.float32)


def assert_same_gradients(forward, model, patches):
    found = []
    for call in (forward, model):
        with no_trace(model):
            call(patches)[1].square().mean().backward()
            found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    got, needed = found
    # Gradients through batch norms of channels-last maps differ, see bench/harness/parity.py.
    assert (got - needed).norm() < 1e-2 * needed.norm()


@pytest.mark.parametrize("config", ENCODERS, ids=lambda config: config.encoder.name)
def test_every_encoder_compiles_to_the_same_gradients(aot, config):
    pytest.importorskip({"r": "torchvision", "v": "timm"}.get(config.encoder.name[0], "torch"))
    model, loss, patches = parts(config)
    asked = replace(config, compile=True)
    forward, done = compiled_or_eager(model, loss, patches, asked, chosen(asked), Ranks())
    assert done and forward is not model
    assert_same_gradients(forward, model, patches)


def test_a_resnet_compiles_for_any_batch(aot):
    """What a user's torch.compile does at a second batch size: symbolic sizes reach conv3x3."""
    pytest.importorskip("torchvision")
    model, _, patches = parts(tiny("resnet18"))
    forward = torch.compile(model)
    for batch in (4, 3):
        assert_same_gradients(forward, model, patches[:, :batch])


def test_inductor_compiles_ours():
    model, loss, patches = parts(tiny("patchnet"))
    asked = Config(compile=True)
    forward, _ = compiled_or_eager(model, loss, patches, asked, chosen(asked), Ranks())
    torch.testing.assert_close(forward(patches)[1], model(patches)[1], rtol=1e-3, atol=1e-3)
    torch.compiler.reset()


def test_trials_leave_no_trace():
    """Batch statistics, the target network, the loss's step and the random state stay."""
    config = replace(tiny("patchnet"), head=HeadConfig(hidden=16, out=8, momentum=0.5))
    model, loss = build_model(config), build_loss("sigreg")
    random = torch.get_rng_state()
    patches = example(config, Ranks(), torch.float32)
    before = copy.deepcopy([model.state_dict(), loss.state_dict()])
    with no_trace(model, loss):
        for _ in range(2):
            assert trial(model, loss, patches, torch.float32) > 0
        torch.rand(3)
        assert loss.state_dict() != before[1]
    assert_bitwise_equal(
        [dict(model.state_dict()), dict(loss.state_dict())], list(map(dict, before))
    )
    assert torch.get_rng_state().equal(random)
    assert all(p.grad is None for p in model.parameters())


def test_precisions_are_timed_on_the_model_itself():
    model, loss, patches = parts(tiny("patchnet"))
    faster, words = choices.time_precisions(model, loss, patches)
    assert isinstance(faster, bool) and "fp32 " in words and "bf16 " in words


class TestKept:
    def state(self, **more):
        return chosen(replace(TIMM, precision="fp32")).state() | more

    def test_a_resumed_run_takes_what_it_began_with(self, with_bf16):
        kept = self.state(precision="bf16", compile=False)
        found = chosen(TIMM, kept)
        assert found.state() == kept
        assert found.why == {"precision": KEPT, "compile": KEPT}

    def test_an_option_that_is_given_counts(self, with_bf16):
        assert not chosen(replace(TIMM, compile=False), self.state()).compile

    def test_bf16_that_this_machine_does_not_compute(self):
        kept = self.state(precision="bf16")
        with pytest.raises(ValueError, match=r"began in bf16, .* give --precision bf16"):
            chosen(TIMM, kept)
        assert chosen(replace(TIMM, precision="bf16"), kept).precision == "bf16"

    def test_another_device(self):
        kept = self.state(device="cuda", precision="fp32", views="device")
        with pytest.raises(ValueError, match=r"began on cuda, .* give --device cuda .* cpu"):
            chosen(TIMM, kept)
        moved = chosen(replace(TIMM, device="cpu"), kept)
        assert (moved.precision, moved.views) == ("fp32", "host")

    def test_other_implementations(self):
        kept = self.state(ops=self.state()["ops"] | {"vicreg": "other"})
        with pytest.raises(ValueError, match=r"other implementations of vicreg .* --impl cpu"):
            chosen(TIMM, kept)
        assert chosen(replace(TIMM, impl="cpu"), kept).ops["vicreg"] == "cpu"

    def test_simd_levels(self, monkeypatch):
        monkeypatch.delenv("BAGSSL_SIMD", raising=False)
        lowest, highest = _C.simd_levels()[0], _C.simd_levels()[-1]
        of_float32 = _C.simd_levels()[:3][-1]  # a run in float32 needs no instructions for bf16
        assert chosen(TIMM, self.state(simd=lowest)).simd == lowest == _C.simd_level()
        assert chosen(TIMM).simd == of_float32  # a new run is not held to it
        assert _C.simd_level() == highest
        assert chosen(replace(TIMM, precision="bf16")).simd == highest
        with pytest.raises(ValueError, match=r"began with avx9 loops, .* set BAGSSL_SIMD="):
            chosen(TIMM, self.state(simd="avx9"))
        monkeypatch.setenv("BAGSSL_SIMD", highest)
        assert chosen(TIMM, self.state(simd="avx9")).simd == of_float32

    def test_patches(self):
        config = replace(TIMM, loader=LoaderConfig(views="device"))
        assert chosen(config, self.state()).views == "device"
        assert chosen(TIMM, self.state(views="device")).views == "device"


@pytest.fixture
def no_compiler_later(monkeypatch):
    """Makes torch.compile as it is where there is no C++ compiler."""
    from torch._dynamo.exc import TorchDynamoException

    def refuse(*args):
        raise TorchDynamoException("InvalidCxxCompiler: No working C++ compiler found\nmore")

    return lambda: monkeypatch.setattr(torch, "compile", lambda model, **_: refuse)


@pytest.fixture
def no_compiler(no_compiler_later):
    no_compiler_later()


@pytest.fixture
def start(tmp_path):
    """Runs the program in this process: start(run, flags...) -> (status, run directory)."""
    pixels = np.random.default_rng(0).integers(0, 256, (33, 16, 16, 3), dtype=np.uint8)
    np.save(tmp_path / "images.npy", pixels)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(DENSE))

    def run(name, *flags):
        common = ["--config", str(tmp_path / "r.yaml"), "--data", str(tmp_path / "images.npy")]
        folder = tmp_path / name
        return train.main([*common, "--run_dir", str(folder), *flags]), folder

    return run


class TestRuns:
    def test_failed_compilation_under_auto_is_said(self, start, monkeypatch, no_compiler, capsys):
        monkeypatch.setattr(choices, "_compile", lambda *_: (True, "a test"))
        status, run_dir = start("run", "--epochs", "1")
        said = capsys.readouterr().out
        assert status == 0 and final(run_dir)["choices"]["compile"] is False
        (line,) = (line for line in said.splitlines() if "torch.compile fails here" in line)
        assert "the run is not compiled" in line and "No working C++ compiler found" in line
        assert "more" not in line  # of torch's advice

    def test_failed_compilation_that_was_asked_for(self, start, no_compiler, capsys):
        status, run_dir = start("run", "--compile")
        assert status == 2 and not run_dir.exists()
        assert "--compile false trains without" in capsys.readouterr().err

    def test_compiled_runs_resume_compiled_or_not_at_all(self, start, monkeypatch, aot, capsys):
        with monkeypatch.context() as patch:
            patch.setattr(choices, "_compile", lambda *_: (True, "a test"))
            _, whole = start("whole")
            interrupt_after(patch, 5)
            assert start("parts")[0] != 0
        assert start("parts", "--resume", "auto")[0] == 0
        assert_bitwise_equal(final(whole), final(start("parts", "--resume", "auto")[1]))
        assert "compile true (auto: as the run began)" in capsys.readouterr().out

    def test_compiled_runs_where_nothing_compiles(self, start, aot, no_compiler_later, capsys):
        start("run", "--compile", "--max_steps", "4")
        no_compiler_later()
        assert start("run", "--resume", "auto", "--max_steps", "4")[0] == 2
        assert "the run began compiled, and torch.compile fails" in capsys.readouterr().err
        assert start("run", "--resume", "auto", "--max_steps", "4", "--compile", "false")[0] == 0

    def test_what_was_chosen_is_kept(self, start, monkeypatch, with_bf16, capsys):
        """A run that timing put in bf16 resumes in bf16, without timing, to the same bits."""
        monkeypatch.setattr(choices, "TIMED", 0)
        timed = []

        def time_precisions(*_):
            timed.append(1)
            return True, "bf16 1 ms"

        monkeypatch.setattr("bagssl_fast.training.run.time_precisions", time_precisions)
        _, whole = start("whole")
        with monkeypatch.context() as patch:
            interrupt_after(patch, 5)
            _, parts = start("parts")
        assert len(timed) == 2
        state = checkpoint.load(checkpoint.latest(parts))
        assert state["choices"]["precision"] == "bf16"
        environment = json.loads((parts / "env.json").read_text())
        assert environment["choices"] == state["choices"]
        assert start("parts", "--resume", "auto")[0] == 0 and len(timed) == 2
        assert_bitwise_equal(final(whole), final(parts))
        said = capsys.readouterr().out
        assert "precision bf16 (auto: bf16 1 ms)" in said
        assert "precision bf16 (auto: as the run began)" in said

        monkeypatch.setattr(machine, "cpu_flags", lambda: frozenset({"avx2"}))
        assert start("parts", "--resume", "auto")[0] == 2
        assert "give --precision bf16" in capsys.readouterr().err
        assert start("parts", "--resume", "auto", "--precision", "bf16")[0] == 0
        assert start("parts", "--resume", "auto", "--precision", "fp32")[0] == 2
        assert "precision: bf16 -> fp32" in capsys.readouterr().err
