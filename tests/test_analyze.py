"""The analysis: verdicts from numbers, results through JSON, models trained once, whole runs."""

import json
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bagssl_fast import arguments, cli
from bagssl_fast.analyze import aggregation, bags, epochs, mean
from bagssl_fast.analyze.__main__ import main
from bagssl_fast.analyze.analysis import describe, examine, make_context, studies
from bagssl_fast.analyze.models import DONE, Context, Stopped
from bagssl_fast.analyze.options import Analyze
from bagssl_fast.analyze.study import Figure, Result, Study, Table
from bagssl_fast.analyze.verdict import Difference, all_of, difference, paired, percent
from bagssl_fast.evaluation.features import CENTER, embed_patches, extract
from bagssl_fast.training.meter import Meter

RECIPE = """
max_steps: 4
batch_size: 32
threads: 1
log_every: 1
bag: {patches: 2}
augment: {size: 16, scale: [0.25, 0.25], blur_prob: 0.0, solarize_prob: 0.0}
encoder: {name: patchnet, width: 4, options: {stem: 8, feature_dim: 16}}
head: {hidden: 16, out: 16, num_layers: 2}
loss: {name: vicreg}
eval: {max_train_images: 96, max_test_images: 64}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe, and 32-pixel images of four colors with noise, as train and test arrays."""
    folder = tmp_path_factory.mktemp("analyze")
    (folder / "tiny.yaml").write_text(RECIPE)
    generator = np.random.default_rng(0)
    colors = generator.integers(60, 200, (4, 3))
    for split, count in (("train", 128), ("test", 64)):
        labels = np.arange(count) % 4
        noise = generator.integers(-50, 50, (count, 32, 32, 3))
        pixels = np.clip(colors[labels][:, None, None] + noise, 0, 255).astype(np.uint8)
        np.savez(folder / f"{split}.npz", images=pixels, labels=labels)
    return folder


def context(folder: Path, out: Path, **changes) -> Context:
    base = cli.load(folder / "tiny.yaml")
    base = replace(base, data=str(folder / "train.npz"), test_data=str(folder / "test.npz"))
    return Context(replace(base, **changes), out, quick=True)


class TestVerdict:
    def test_is_the_difference_against_its_error(self):
        assert Difference(3.0, 1.0, 2).verdict == "holds"
        assert Difference(1.9, 1.0, 2).verdict == "undecided"
        assert Difference(-3.0, 1.0, 2).verdict == "does not hold"

    def test_error_adds_seeds_and_test_images(self):
        one = difference([0.5], [0.5], 100)
        assert (one.mean, one.error) == (0.0, pytest.approx((0.5 / 100) ** 0.5))
        two = difference([0.6, 0.7], [0.5, 0.5], 10**9)
        assert two.mean == pytest.approx(0.15)
        assert two.error == pytest.approx(0.05, rel=1e-3)  # sd 0.0707 of two
        assert two.points() == "+15.0 ± 5.0"

    def test_paired_needs_no_second_test_set(self):
        assert paired(torch.full((2, 50), 0.25)).error == 0.0
        wide = paired(torch.tensor([[0.0, 1.0] * 50]))
        assert wide.error == pytest.approx(0.5 / 10, rel=0.02)

    def test_what_cannot_be_compared_is_refused(self):
        with pytest.raises(ValueError, match="as many seeds"):
            difference([0.5], [0.5, 0.6], 10)
        with pytest.raises(ValueError, match="not empty"):
            paired(torch.zeros(0, 3))

    def test_a_claim_of_parts_holds_if_all_do(self):
        assert all_of(["holds", "holds"]) == "holds"
        assert all_of(["holds", "undecided"]) == "undecided"
        assert all_of(["holds", "does not hold", "undecided"]) == "does not hold"
        assert all_of([]) == "undecided"

    def test_most_methods_must_gain_and_none_lose(self):
        up, flat, down = (Difference(m, 0.01, 2) for m in (0.1, 0.0, -0.1))

        def verdict(*gains):
            return aggregation.verdict({str(i): {"linear": g} for i, g in enumerate(gains)})

        assert verdict(up, up, flat) == "holds"
        assert verdict(up, up, down) == "undecided"
        assert verdict(up, flat) == "undecided"
        assert verdict(down, down, flat) == "does not hold"

    def test_more_patches_must_win_one_pass_and_not_lose_at_equal_compute(self):
        up, flat, down = (Difference(m, 0.01, 2) for m in (0.1, 0.0, -0.1))

        def verdict(images, compute):
            return epochs.verdict({"images": {"linear": images}, "compute": {"linear": compute}})

        assert verdict(up, flat) == "holds"
        assert verdict(up, down) == "does not hold"
        assert verdict(flat, up) == "undecided"

    def test_percent(self):
        assert percent([0.5]) == "50.0"
        assert percent([0.5, 0.6]) == "55.0 ± 7.1"


class TestResult:
    RESULT = Result(
        claim=3,
        title="t",
        verdict="holds",
        text="one\n\ntwo",
        tables=[Table("a", ["x", "y"], [["b", 1.5], ["c", 2]])],
        figures=[Figure("f", "f.png", "caption")],
        numbers={"list": [1, 2.5], "none": None},
        seconds=1.5,
    )

    def test_goes_through_json_unchanged(self):
        text = json.dumps(self.RESULT.to_json())
        assert Result.from_json(json.loads(text)) == self.RESULT

    @pytest.mark.parametrize(
        "change", [{"verdict": "maybe"}, {"tables": [{"title": "a"}]}, {"extra": 1}], ids=str
    )
    def test_what_is_none_is_refused(self, change):
        with pytest.raises(ValueError, match="not the result of a study"):
            Result.from_json(self.RESULT.to_json() | change)

    def test_tables_are_markdown(self):
        assert self.RESULT.tables[0].markdown().splitlines()[2:] == [
            "| x | y |",
            "| --- | ---: |",
            "| b | 1.5 |",
            "| c | 2 |",
        ]

    def test_is_kept_while_the_settings_stay(self, folder, tmp_path):
        calls = []
        study = Study("s", 3, "t", lambda _: calls.append(1) or self.RESULT)
        first = examine(study, context(folder, tmp_path))
        assert examine(study, context(folder, tmp_path)) == first
        assert len(calls) == 1
        examine(study, context(folder, tmp_path, max_steps=5))
        assert len(calls) == 2

    def test_time_counts_interrupted_parts(self, folder, tmp_path):
        def interrupted(_):
            raise Stopped(signal.SIGTERM, "now")

        c = context(folder, tmp_path)
        with pytest.raises(Stopped):
            examine(Study("s", 3, "t", interrupted), c)
        path = Study("s", 3, "t", interrupted).result_path(tmp_path)
        kept = json.loads(path.read_text())
        path.write_text(json.dumps(kept | {"seconds": 100.0}))
        assert examine(Study("s", 3, "t", lambda _: self.RESULT), c).seconds >= 100


class TestModels:
    def test_folder_is_keyed_by_what_decides_the_weights(self, folder, tmp_path):
        c = context(folder, tmp_path)
        same = c.config(side=0.5), c.config(side=0.5, threads=2, log_every=7)
        assert c.run_dir(same[0]) == c.run_dir(same[1])
        others = [c.config(side=0.25), c.config(side=0.5, seed=1), c.config(side=0.5, loss="byol")]
        assert len({c.run_dir(config) for config in (same[0], *others)}) == 4

    def test_every_loss_is_ready_to_train(self, folder, tmp_path):
        c = context(folder, tmp_path, max_steps=2)
        for loss in aggregation.METHODS:
            if loss in aggregation.LOSSES:
                assert (c.train(c.config(side=0.0, loss=loss)) / "model.safetensors").is_file()

    def test_finished_model_is_used_again(self, folder, tmp_path):
        c = context(folder, tmp_path)
        config = c.config(side=0.5)
        run_dir = c.train(config)
        before = (run_dir / "model.safetensors").stat().st_mtime_ns
        assert context(folder, tmp_path).train(config) == run_dir
        assert (run_dir / "model.safetensors").stat().st_mtime_ns == before
        assert not list(run_dir.glob("checkpoints/*.pt"))

    def test_interrupted_training_goes_on(self, folder, tmp_path, monkeypatch):
        whole, parts = context(folder, tmp_path / "a"), context(folder, tmp_path / "b")
        config = whole.config(side=0.5)
        add, steps = Meter.add, []

        def interrupt_at_2(self, *args):
            steps.append(1)
            if len(steps) == 2:
                signal.raise_signal(signal.SIGUSR1)
            return add(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(Meter, "add", interrupt_at_2)
            with pytest.raises(Stopped):
                parts.train(config)
        assert not (parts.run_dir(config) / DONE).exists()
        a, b = (c.model(config).state_dict() for c in (whole, parts))
        assert json.loads((parts.run_dir(config) / DONE).read_text())["steps"] == 4
        assert all(torch.equal(a[name], b[name]) for name in a)

    def test_scores_are_measured_once(self, folder, tmp_path, monkeypatch):
        c = context(folder, tmp_path)
        config = c.config(side=0.5)
        scores = bags.bag_scores(c, config, 0.5, (CENTER, 1, 4), projections_up_to=1)
        assert set(scores) == {("h", 0), ("h", 1), ("h", 4), ("z", 0), ("z", 1)}
        monkeypatch.setattr(bags, "extract", None)
        assert bags.bag_scores(c, config, 0.5, (CENTER, 1, 4), projections_up_to=1) == scores

    def test_what_is_used_again_still_counts_as_time(self, folder, tmp_path):
        """A report may not look cheap because its models were there already."""
        study = Study("s", 3, "t", lambda c: use(c))

        def use(c):
            bags.bag_scores(c, c.config(side=0.5), 0.5, (1,))
            return TestResult.RESULT

        first = examine(study, context(folder, tmp_path))
        assert len(first.costs) == 2  # the model, its scores
        assert first.took == first.seconds + sum(first.costs.values()) > 0
        study.result_path(tmp_path).unlink()
        again = examine(study, context(folder, tmp_path))
        assert again.costs == first.costs

        other = replace(again, claim=4, costs=again.costs | {"models/other": 100.0})
        options = Analyze(seeds=1)
        about = describe(options, context(folder, tmp_path), [again, other])
        total = 100 + sum(first.costs.values()) + 2 * again.seconds
        assert about["seconds"] == pytest.approx(total, abs=0.11)  # shared models once

    def test_single_patches_average_to_the_bag(self, folder, tmp_path):
        c = context(folder, tmp_path)
        config = bags.with_patch_scale(c.config(side=0.5), 0.5, (4,))
        model = c.random_model(config)
        plan = bags.make_plan(config, model, c.device)
        source = c.images.test
        bag, _ = extract(model, config, source, replace(plan, counts=(CENTER, 4)))
        patches = embed_patches(model, config, source, plan, 4)
        assert patches.shape == (4, 64, 16)
        torch.testing.assert_close(patches.mean(dim=0), bag["h", 4])
        center = embed_patches(model, config, source, plan, CENTER)
        torch.testing.assert_close(center[0], bag["h", CENTER])

    def test_images_without_labels_are_refused(self, tmp_path):
        np.save(tmp_path / "train.npy", np.zeros((64, 32, 32, 3), np.uint8))
        np.save(tmp_path / "test.npy", np.zeros((64, 32, 32, 3), np.uint8))
        (tmp_path / "tiny.yaml").write_text(RECIPE)
        base = replace(cli.load(tmp_path / "tiny.yaml"), data=str(tmp_path / "train.npy"))
        c = Context(base, tmp_path, quick=True)
        with pytest.raises(ValueError, match="no labels"):
            bags.bag_scores(c, c.config(side=0.5), 0.5, (1,))


def test_mean_of_patches_meets_a_whole_that_is_their_mean(folder, tmp_path, monkeypatch):
    """If the whole-image embedding is the mean of the patches, the cosine must go to 1."""
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(64, 40, 8, generator=generator)

    def embed(model, config, source, plan, count, indices=None):
        return patches.mean(dim=0, keepdim=True) if count == CENTER else patches

    monkeypatch.setattr(mean, "embed_patches", embed)
    c = context(folder, tmp_path)
    config = c.config(side=0.5)
    curves = mean.curves(c, c.random_model(config), config, seed=0)
    assert curves["own"].shape == (7, 40)
    torch.testing.assert_close(curves["centered"][-1], torch.ones(40))
    assert curves["found"][-1].mean() == 1
    assert curves["centered"][0].mean() < 0.5
    assert curves["centered other"][-1].abs().mean() < 0.5


class TestCommand:
    def test_runs_from_images_to_report(self, folder, tmp_path, monkeypatch, capsys):
        """Claims 1, 2, 3 and 6, tiny; the second call only writes the report again."""
        argv = ["--config", str(folder / "tiny.yaml"), "--data", str(folder / "train.npz")]
        argv += ["--out", str(tmp_path), "--claims", "1,2,3,6", "--quick", "--threads", "1"]
        assert main(argv) == 0
        content = json.loads((tmp_path / "results.json").read_text())
        results = [Result.from_json(result) for result in content["results"]]
        assert [result.claim for result in results] == [1, 2, 3, 6]
        for result in results:
            assert result.figures and result.tables and result.text
            for figure in result.figures:
                assert (tmp_path / figure.path).read_bytes().startswith(b"\x89PNG")
        page = (tmp_path / "report.html").read_text()
        assert page.count("data:image/png;base64,") == sum(len(r.figures) for r in results)
        assert "Claim 2: accuracy" in (tmp_path / "README.md").read_text()

        monkeypatch.setattr(Context, "train", None)  # nothing is trained a second time
        capsys.readouterr()
        assert main(argv) == 0
        assert capsys.readouterr().out.count("kept result") == 4
        assert [
            Result.from_json(r)
            for r in json.loads((tmp_path / "results.json").read_text())["results"]
        ] == results

    def test_a_signal_is_no_success(self, folder, tmp_path, monkeypatch, capsys):
        """`bagssl analyze && next` must not continue with half an analysis."""
        argv = ["--config", str(folder / "tiny.yaml"), "--data", str(folder / "train.npz")]
        argv += ["--out", str(tmp_path), "--claims", "3", "--quick", "--threads", "1"]
        add = Meter.add

        def interrupt(self, *args):
            signal.raise_signal(signal.SIGTERM)
            return add(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(Meter, "add", interrupt)
            assert main(argv) == 128 + signal.SIGTERM
        assert "the same command resumes it" in capsys.readouterr().err
        assert not (tmp_path / "results.json").exists()
        assert main(argv) == 0 and (tmp_path / "results.json").is_file()

    @pytest.mark.parametrize(
        ("flags", "words"),
        [
            (["--claims", "7"], "claims 1 to 6"),
            (["--claims", "one"], "--claims one"),
            (["--seeds", "0"], "--seeds 0"),
            (["--claims", "3", "--data", "nowhere.tar"], "nowhere.tar"),
        ],
        ids=str,
    )
    def test_says_what_is_wrong(self, tmp_path, capsys, flags, words):
        assert main(["--out", str(tmp_path), *flags]) == 2
        assert words in capsys.readouterr().err

    def test_six_claims_in_order(self):
        assert [study.claim for study in studies((3, 1, 2, 6, 5, 4))] == [1, 2, 3, 4, 5, 6]

    def test_seeds_and_recipe(self, folder):
        argv = ["--config", str(folder / "tiny.yaml"), "--seeds", "3"]
        c = make_context(arguments.read(Analyze, argv, "analyze"))
        assert (c.seeds, c.base.data, c.base.max_steps) == ((0, 1, 2), "demo", 4)
