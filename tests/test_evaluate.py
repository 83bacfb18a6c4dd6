"""Evaluation: probes against their formulas, grids, features patch by patch, whole runs."""

import builtins
import json
import math
from dataclasses import asdict, fields, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bagssl_fast import cli, evaluate, train
from bagssl_fast.augment import Augment
from bagssl_fast.config import BagConfig, Config, EncoderConfig, EvalConfig, HeadConfig
from bagssl_fast.data import open_source
from bagssl_fast.evaluation import quality
from bagssl_fast.evaluation.datasets import find_test_data
from bagssl_fast.evaluation.features import (
    CENTER,
    Plan,
    bag_mean,
    calibrate,
    dense_grid,
    dense_stride,
    extract,
)
from bagssl_fast.evaluation.measure import new_name
from bagssl_fast.evaluation.probes import (
    KNN_SPACES,
    RIDGE_GRID,
    SHRINKAGE,
    knn_accuracy,
    knn_space,
    linear_probe,
)
from bagssl_fast.models.bag_model import BagModel, build_model


def clusters(n, dim, classes=3, noise=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(classes, (n,), generator=generator)
    return centers[labels] + noise * torch.randn(n, dim, generator=generator), labels


class TestKNN:
    def test_is_the_weighted_vote(self):
        train_x, train_y = clusters(40, 6, noise=1.5)
        test_x, test_y = clusters(30, 6, noise=1.5, seed=1)
        k, t = 5, 0.07
        correct = 0
        for x, y in zip(test_x, test_y, strict=True):
            cosine = [float(F.cosine_similarity(x, b, dim=0)) for b in train_x]
            votes = [0.0, 0.0, 0.0]
            for i in sorted(range(40), key=lambda i: -cosine[i])[:k]:
                votes[int(train_y[i])] += math.exp(cosine[i] / t)
            correct += votes.index(max(votes)) == int(y)
        got = knn_accuracy(train_x, train_y, test_x, test_y, k=k, temperature=t, chunk=7)
        assert got == correct / 30

    def test_clamps_k_to_the_bank(self):
        x, y = clusters(4, 6)
        assert knn_accuracy(x, y, x, y, k=20) >= 0.5


class TestKNNSpace:
    def test_whitened_cosines_are_those_of_the_principal_components(self):
        """Against the eigenvectors: a Cholesky factor may be taken from the wrong side."""
        x, _ = clusters(80, 6, noise=2.0)
        x *= torch.tensor([10.0, 5, 1, 1, 0.5, 0.1])
        y, _ = clusters(9, 6, seed=1)
        a, b = knn_space(x, y, "whitened")
        centered = (x - x.mean(0)).double()
        values, vectors = torch.linalg.eigh(centered.T @ centered / 80)
        root = vectors / (values + SHRINKAGE * values.mean()).sqrt()
        want = [(v - x.mean(0)).double() @ root for v in (x, y)]
        got = F.normalize(b, dim=1) @ F.normalize(a, dim=1).T
        needed = F.normalize(want[1], dim=1) @ F.normalize(want[0], dim=1).T
        torch.testing.assert_close(got.double(), needed, rtol=1e-4, atol=1e-4)

    def test_rooted_is_whitened_roots_with_their_signs(self):
        x, _ = clusters(60, 5, noise=2.0)
        y, _ = clusters(9, 5, seed=1)
        got = knn_space(x, y, "rooted")
        want = knn_space(*(v.sign() * v.abs().sqrt() for v in (x, y)), "whitened")
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)

    def test_finds_classes_below_a_common_direction_and_a_loud_one(self):
        x, y = clusters(300, 8, noise=0.6)
        test_x, test_y = clusters(100, 8, noise=0.6, seed=1)
        loud = torch.randn(400, 1, generator=torch.Generator().manual_seed(2))
        loud = 30 * loud * torch.tensor([1.0, -1, 1, -1, 1, -1, 1, -1]) + 100
        x, test_x = x + loud[:300], test_x + loud[300:]
        scores = {
            space: knn_accuracy(*(v := knn_space(x, test_x, space))[:1], y, v[1], test_y)
            for space in KNN_SPACES
        }
        assert scores["whitened"] > 0.9 > 0.6 > scores["plain"]

    @pytest.mark.parametrize("space", KNN_SPACES)
    def test_test_rows_take_no_part_in_the_statistics(self, space):
        x, _ = clusters(30, 4)
        y, _ = clusters(10, 4, seed=1)
        before = x.clone()
        together, alone = knn_space(x, y, space)[1], knn_space(x, y[:1], space)[1]
        torch.testing.assert_close(together[:1], alone)
        assert torch.equal(x, before)  # the linear probe reads them next

    def test_dead_features_and_fewer_rows_than_features(self):
        x, y = clusters(20, 40)
        x = torch.cat([x, torch.zeros(20, 2), torch.full((20, 2), 7.0)], dim=1)
        for space in KNN_SPACES:
            a, b = knn_space(x, x, space)
            assert a.isfinite().all() and knn_accuracy(a, y, b, y) > 0.9
        flat, _ = knn_space(torch.ones(5, 3), torch.ones(2, 3), "whitened")
        assert flat.isfinite().all()

    def test_unknown_space(self):
        with pytest.raises(ValueError, match="'white'; supported: rooted, whitened"):
            knn_space(torch.ones(2, 2), torch.ones(2, 2), "white")


class TestLinear:
    @pytest.mark.parametrize("features", [5, 90])
    def test_ridge_is_least_squares_with_a_free_bias(self, features):
        """Against the augmented least-squares problem, solved by lstsq in float64.

        With more features than rows the probe solves the other system, that of the rows.
        """
        x, y = clusters(60, features, noise=2.0)
        test_x, test_y = clusters(50, features, noise=2.0, seed=1)
        result = linear_probe(x, y, test_x, test_y)
        assert result.penalty in RIDGE_GRID
        mean, std = x.mean(0), x.std(0, correction=0)
        a, b = ((v - mean) / std for v in (x, test_x))
        damping = math.sqrt(result.penalty * len(a))
        rows = torch.cat(
            [torch.cat([a, torch.ones(60, 1)], 1), damping * torch.eye(features, features + 1)]
        )
        targets = torch.cat([F.one_hot(y, 3).float(), torch.zeros(features, 3)])
        weights = torch.linalg.lstsq(rows.double(), targets.double()).solution.float()
        logits = torch.cat([b, torch.ones(50, 1)], 1) @ weights
        assert result.accuracy == pytest.approx(float((logits.argmax(1) == test_y).float().mean()))

    @pytest.mark.parametrize("method", ["ridge", "logistic"])
    def test_finds_separable_classes(self, method):
        x, y = clusters(120, 8, noise=0.1)
        test_x, test_y = clusters(50, 8, noise=0.1, seed=1)
        assert linear_probe(x, y, test_x, test_y, method=method).accuracy == 1.0

    @pytest.mark.parametrize("method", ["ridge", "logistic"])
    def test_never_chooses_on_the_test_set(self, method):
        x, y = clusters(80, 6, noise=2.0)
        test_x, test_y = clusters(30, 6, seed=1)
        one = linear_probe(x, y, test_x, test_y, method=method)
        other = linear_probe(x, y, test_x, test_y.flip(0), method=method)
        assert (one.penalty, one.held_out) == (other.penalty, other.held_out)

    def test_few_rows_take_turns_in_choosing_the_penalty(self):
        """One tenth of 70 rows would be 7 of them: too few to tell one penalty from another."""
        x, y = clusters(70, 6, noise=3.0)
        held_out = linear_probe(x, y, x, y).held_out
        assert round(70 * held_out) == pytest.approx(70 * held_out)
        assert round(7 * held_out) != pytest.approx(7 * held_out)

    @pytest.mark.parametrize("method", ["ridge", "logistic"])
    def test_dead_constant_and_too_many_features(self, method):
        x, y = clusters(30, 40)
        x = torch.cat([x, torch.zeros(30, 2), torch.full((30, 2), 7.0)], dim=1)
        result = linear_probe(x, y, x, y, method=method)
        assert result.accuracy > 0.9

    def test_unknown_method(self):
        x, y = clusters(10, 3)
        with pytest.raises(ValueError, match="ridge, logistic"):
            linear_probe(x, y, x, y, method="svm")


class TestCollapse:
    def test_healthy_and_collapsed(self):
        generator = torch.Generator().manual_seed(0)
        spread = torch.randn(256, 32, generator=generator)
        one_point = torch.ones(256, 32) + 1e-4 * spread
        one_line = spread[:, :1] * torch.ones(1, 32)
        assert quality.collapse(spread)["std"] == pytest.approx(1.0, abs=0.02)
        assert quality.collapse(spread)["rank"] > 28
        assert quality.collapse(one_point)["std"] < 1e-3
        assert quality.collapse(one_line)["rank"] < 1.01

    def test_rank_counts_equal_directions(self):
        assert quality.effective_rank(torch.eye(8)[:5]) == pytest.approx(5.0, rel=1e-4)
        assert quality.effective_rank(torch.zeros(4, 4)) == 0.0
        assert math.isnan(quality.effective_rank(torch.full((2, 2), math.nan)))


class TestGrid:
    @pytest.mark.parametrize("span", [0, 1, 4, 15, 16, 21, 48, 124])
    @pytest.mark.parametrize("counts", [(1,), (1, 4), (1, 4, 16), (1, 4, 16, 64), (4, 256)])
    def test_spreads_evenly_from_end_to_end_around_the_middle(self, span, counts):
        stride = dense_stride(counts, span)
        positions = span // stride + 1
        for count in counts:
            n = round(math.sqrt(count))
            grid = dense_grid(count, positions)
            assert len(grid) == n and min(grid) >= 0 and max(grid) < positions
            if n == 1:
                assert abs(stride * grid[0] - span / 2) <= 0.5
            elif span >= n - 1:
                assert grid == sorted(set(grid))
                assert grid[0] == 0 and span - stride * grid[-1] <= 1

    def test_takes_the_coarsest_stride(self):
        assert [dense_stride((c,), 16) for c in (1, 4, 16, 64, 256)] == [8, 8, 4, 2, 1]


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.arange(36) % 3
    base = rng.integers(0, 255, (3, 16, 16, 3))
    pixels = np.clip(base[labels] + rng.integers(-40, 40, (36, 16, 16, 3)), 0, 255)
    np.savez(tmp_path / "x-train.npz", images=pixels[:24].astype(np.uint8), labels=labels[:24])
    np.savez(tmp_path / "x-test.npz", images=pixels[24:].astype(np.uint8), labels=labels[24:])
    return tmp_path


CONFIG = Config(
    epochs=2,
    batch_size=8,
    threads=1,
    device="cpu",
    bag=BagConfig(patches=2, dense=True, stride=4),
    augment=Augment(size=16, scale=(0.6, 1.0)),
    encoder=EncoderConfig(patch_size=8, width=4),
    head=HeadConfig(hidden=16, out=8, num_layers=2),
)


def lively(model):
    """Batch-norm statistics and gains that are not those of the start."""
    generator = torch.Generator().manual_seed(1)
    for name, value in model.state_dict().items():
        if name.endswith(("running_mean", "bias", "beta")):
            value.copy_(0.1 * torch.randn(value.shape, generator=generator))
        elif name.endswith("running_var"):
            value.copy_(0.5 + torch.rand(value.shape, generator=generator))
    return model.eval()


def normalized(source, indices=None):
    chosen = range(len(source)) if indices is None else indices
    pixels = torch.stack([torch.from_numpy(np.array(source.decode(i))) for i in chosen])
    return (pixels.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5


PLAN = Plan((CENTER, 1, 4, 16), 4, batch_size=7, device=torch.device("cpu"), num_threads=1)


class TestExtract:
    def test_dense_bags_are_means_over_patches(self, images):
        """One pass over whole images with folded norms equals encoding each patch by itself."""
        source = open_source(str(images / "x-train.npz"))
        model = lively(build_model(CONFIG))
        features, labels = extract(model, CONFIG, source, PLAN)
        assert labels.tolist() == source.labels.tolist()
        assert set(features) == {("h", n) for n in PLAN.counts} | {("z", n) for n in (0, 1, 4)}
        x = normalized(source)
        corners = {1: [4], 4: [0, 8], 16: [0, 2, 6, 8]}  # 5 positions, 2 pixels apart
        with torch.no_grad():
            for count, sides in corners.items():
                patches = [x[:, :, i : i + 8, j : j + 8] for i in sides for j in sides]
                h = torch.stack([model.embed(p) for p in patches])
                torch.testing.assert_close(features["h", count], h.mean(0), rtol=1e-4, atol=1e-5)
                if count <= 4:
                    z = model.project(h).mean(0)
                    torch.testing.assert_close(features["z", count], z, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("projected", [4, 16])
    def test_a_grid_has_the_means_of_its_regions_side_by_side(self, images, projected):
        """Off the maps (nothing is projected) and from embeddings; of the largest bag alone."""
        source = open_source(str(images / "x-train.npz"))
        model = lively(build_model(CONFIG))
        plan = replace(PLAN, projection_up_to=projected, grid=2)
        features, _ = extract(model, CONFIG, source, plan)
        plain, _ = extract(model, CONFIG, source, replace(plan, grid=1))
        x, sides = normalized(source), [0, 2, 6, 8]
        with torch.no_grad():
            h = torch.stack(
                [model.embed(x[:, :, i : i + 8, j : j + 8]) for i in sides for j in sides]
            )
            layers = {"h": h, "z": model.project(h)}
        for layer in ("h", "z") if projected == 16 else ("h",):
            rows = layers[layer].unflatten(0, (4, 4))
            want = [rows[i : i + 2, j : j + 2].mean((0, 1)) for i in (0, 2) for j in (0, 2)]
            got = features[layer, 16]
            torch.testing.assert_close(got, torch.cat(want, dim=1), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(bag_mean(got, 2), plain[layer, 16], rtol=1e-4, atol=1e-5)
        for key in set(plain) - {("h", 16), ("z", 16)}:
            assert torch.equal(features[key], plain[key])

    def test_central_crop_is_the_whole_image_at_patch_size(self, images):
        source = open_source(str(images / "x-train.npz"))
        model = lively(build_model(CONFIG))
        features, _ = extract(model, CONFIG, source, replace(PLAN, counts=(CENTER,)))
        small = F.interpolate(normalized(source), size=8, mode="bilinear", antialias=True)
        with torch.no_grad():
            want = model.embed(small)
        torch.testing.assert_close(features["h", CENTER], want, rtol=0, atol=0.05)

    def test_patch_by_patch_where_there_is_no_dense_form(self, images):
        """A backbone that returns the mean color: a grid's mean follows from pixels alone."""

        class MeanColor(nn.Module):
            patch_size, feature_dim, head_dim = 8, 3, 3

            def forward(self, x):
                return x.mean((2, 3))

        config = replace(CONFIG, bag=BagConfig(2), augment=Augment(size=8, scale=(0.25, 0.25)))
        model = BagModel(MeanColor(), build_model(CONFIG).head)
        source = open_source(str(images / "x-train.npz"))
        plan = replace(PLAN, counts=(4,), projection_up_to=-1)
        whole, _ = extract(model, config, source, plan)
        torch.testing.assert_close(
            whole["h", 4], normalized(source).mean((2, 3)), rtol=0, atol=1e-2
        )
        quarters, _ = extract(model, config, source, replace(plan, grid=2))
        corners = normalized(source).unflatten(2, (2, 8)).unflatten(4, (2, 8)).mean((3, 5))
        corners = corners.flatten(2).transpose(1, 2).flatten(1)
        torch.testing.assert_close(quarters["h", 4], corners, rtol=0, atol=1e-2)
        chosen = torch.tensor([3, 5, 20])
        part, labels = extract(model, config, source, replace(plan, batch_size=100), chosen)
        torch.testing.assert_close(part["h", 4], whole["h", 4][chosen])
        assert labels.tolist() == source.labels[chosen.numpy()].tolist()

    def test_calibration_averages_the_statistics_of_batches(self):
        model = build_model(CONFIG)
        batches = [torch.randn(2, 4, 3, 16, 16) * (i + 1) for i in range(3)]
        assert calibrate(model, iter(batches)) == 3
        conv, norm = model.backbone.layers[0], model.backbone.layers[1]
        with torch.no_grad():
            y = [conv(b.flatten(0, 1)) for b in batches]
        want = torch.stack([v.mean((0, 2, 3)) for v in y]).mean(0)
        torch.testing.assert_close(norm.running_mean, want)
        assert norm.momentum == 0.1 and not model.training


@pytest.fixture
def run_dir(images, tmp_path):
    """A finished run on images with labels and a test set beside them."""
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(cli.to_yaml(CONFIG))
    out = tmp_path / "run"
    flags = ["--data", str(images / "x-train.npz"), "--run_dir", str(out)]
    assert train.main(["--config", str(recipe), *flags]) == 0
    return out


def evaluation(run_dir, which=-1):
    """One of the kept evaluations, by default the latest."""
    return json.loads(sorted((run_dir / "evaluations").glob("*.json"))[which].read_text())


class TestRun:
    flags = ("--patches", "1,4,16", "--projection-patches", "4")

    def test_table_json_and_curve(self, run_dir, capsys):
        assert evaluate.main([str(run_dir), *self.flags]) == 0
        said = capsys.readouterr().out
        assert "x-test.npz (found by its name)" in said
        assert "trained, embedding h" in said and "random, projection z" in said
        assert "center |" in said and "%" in said
        assert (run_dir / "eval.png").read_bytes().startswith(b"\x89PNG")
        result = json.loads((run_dir / "eval.json").read_text())
        assert (result["train_images"], result["test_images"], result["step"]) == (24, 12, 6)
        rows = {(r["network"], r["layer"], r["patches"]): r for r in result["results"]}
        assert len(rows) == 2 * (4 + 3)
        row = rows["trained", "h", 16]
        assert 0 <= row["knn"] <= 1 and 0 <= row["linear"] <= 1 and row["rank"] > 1
        assert row["linear"] >= 2 / 3  # three colors: easy
        assert rows["random", "h", 16]["std"] != row["std"]
        assert any("statistics averaged" in note for note in result["notes"])

    def test_a_grid_and_a_space_stand_beside_the_plain_mean(self, run_dir, capsys):
        """The paper's row, the plain mean read by a plain kNN, is there in any case."""
        assert evaluate.main([str(run_dir), *self.flags, "--knn-space", "plain"]) == 0
        plain = json.loads((run_dir / "eval.json").read_text())["results"]
        assert not any("knn_" in key for row in plain for key in row)
        capsys.readouterr()
        assert evaluate.main([str(run_dir), *self.flags, "--grid", "2"]) == 0
        said = capsys.readouterr().out
        assert "\n  16 2x2 |" in said and "rooted" in said and "(2x2: the mean of each" in said
        assert (run_dir / "eval.png").is_file()
        rows = json.loads((run_dir / "eval.json").read_text())["results"]
        grids = [row for row in rows if row["grid"] == 2]
        assert [(r["network"], r["layer"], r["patches"]) for r in grids] == [
            ("trained", "h", 16),
            ("random", "h", 16),
        ]
        beside = [row for row in rows if row["grid"] == 1]
        assert all(("knn_rooted" in row) == (row["layer"] == "h") for row in rows)
        assert all(("rank" in row) == (row["grid"] == 1) for row in rows)
        for row, before in zip(beside, plain, strict=True):
            assert all(row[key] == before[key] for key in ("network", "layer", "patches", "knn"))
            assert row["linear"] == pytest.approx(before["linear"], abs=0.1)

    def test_leaves_out_bags_larger_than_the_image_has_patches(self, run_dir, capsys):
        assert evaluate.main([str(run_dir), "--patches", "1,256", "--random=false"]) == 0
        assert "left out: bags of 256 patches" in capsys.readouterr().out
        rows = json.loads((run_dir / "eval.json").read_text())["results"]
        assert {r["patches"] for r in rows} == {"center", 1}

    def test_repeats_to_the_digit(self, run_dir):
        results = []
        for _ in range(2):
            evaluate.main([str(run_dir), "--patches", "1"])
            results.append(json.loads((run_dir / "eval.json").read_text())["results"])
        assert results[0] == results[1]

    def test_an_evaluation_loses_no_earlier_one(self, run_dir, images, tmp_path):
        """eval.json is the latest of the run's own images; all are kept under evaluations/."""
        first = ["--patches", "1,4", "--random", "false"]
        assert evaluate.main([str(run_dir), *first]) == 0
        kept = {name: (run_dir / name).read_bytes() for name in ("eval.json", "eval.png")}
        other = ["--data", str(images / "x-test.npz")]
        assert evaluate.main([str(run_dir), *first, *other]) == 0
        assert {name: (run_dir / name).read_bytes() for name in kept} == kept
        assert evaluate.main([str(run_dir), *first, "--knn_k", "3"]) == 0
        assert json.loads((run_dir / "eval.json").read_text())["settings"]["knn_k"] == 3
        all_of_them = sorted((run_dir / "evaluations").glob("*.json"))
        assert len(all_of_them) == 3 and all_of_them[0].read_bytes() == kept["eval.json"]
        assert all(path.with_suffix(".png").is_file() for path in all_of_them)
        assert evaluation(run_dir, -2)["settings"]["data"] == str(images / "x-test.npz")
        before = (run_dir / "eval.json").read_bytes()
        out = tmp_path / "out"
        assert evaluate.main([str(run_dir), *first, *other, "--out", str(out)]) == 0
        assert (out / "eval.json").is_file() and (out / "eval.png").is_file()
        assert (run_dir / "eval.json").read_bytes() == before

    def test_names_of_one_second_sort_in_the_order_they_were_made(self, tmp_path):
        """`-2.json` sorts before `.json`: the earlier evaluation was taken for the later one."""
        made = []
        for _ in range(30):
            made.append(new_name(tmp_path, ".json"))
            made[-1].touch()
        assert sorted(tmp_path.glob("*.json")) == made

    def test_no_older_picture_stays_beside_a_new_table(self, run_dir):
        first = [str(run_dir), "--patches", "1", "--random", "false"]
        assert evaluate.main(first) == 0 and (run_dir / "eval.png").is_file()
        assert evaluate.main([*first, "--labels", "none"]) == 0
        assert not (run_dir / "eval.png").exists()

    def test_every_option_of_the_record_can_be_set(self, run_dir):
        flags = "--patches [1,4] --view 16 --random false --random_patches 1 --projection-patches 0"
        flags += " --max_train_images 20 --max-test-images 9 --batch_size 5 --probe logistic"
        flags += " --knn_k 3 --knn_t 0.2 --grid 2 --knn_space centered --test_fraction 0.3"
        flags += " --impl reference --threads 1"
        assert evaluate.main([str(run_dir), *flags.split()]) == 0
        settings = json.loads((run_dir / "eval.json").read_text())["settings"]
        changed = {name for name, value in asdict(EvalConfig()).items() if settings[name] != value}
        assert {f.name for f in fields(EvalConfig)} - changed <= {"enabled"}

    def test_the_note_says_what_the_encoder_was_trained_on(self, run_dir, images, capsys):
        """Images held out of another set have not been seen by the encoder."""
        (images / "x-test.npz").rename(images / "other.npz")
        flags = [str(run_dir), "--patches", "1", "--random=false"]
        assert evaluate.main(flags) == 0
        assert "the encoder has seen them" in capsys.readouterr().out
        assert evaluate.main([*flags, "--data", str(images / "other.npz")]) == 0
        said = capsys.readouterr().out
        assert "has seen" not in said and f"was trained on {images / 'x-train.npz'}" in said

    def test_without_a_test_set_a_part_is_held_out(self, run_dir, images, capsys):
        (images / "x-test.npz").unlink()
        flags = ("--random=false", "--max-train-images", "15", "--max-test-images", "4")
        assert evaluate.main([str(run_dir), "--patches", "1", *flags]) == 0
        assert "held out" in capsys.readouterr().out
        result = json.loads((run_dir / "eval.json").read_text())
        assert (result["train_images"], result["test_images"]) == (15, 4)
        assert {r["network"] for r in result["results"]} == {"trained"}

    def test_without_labels(self, run_dir, images, capsys):
        np.save(images / "plain.npy", np.load(images / "x-train.npz")["images"])
        flags = ["--data", str(images / "plain.npy"), "--patches", "1,4", "--grid", "2"]
        assert evaluate.main([str(run_dir), *flags]) == 0
        said = capsys.readouterr().out
        assert "no labels" in said and "rank" in said and "linear |" not in said
        rows = evaluation(run_dir)["results"]
        assert all("knn" not in r and r["rank"] > 0 for r in rows)

    def test_without_matplotlib(self, run_dir, capsys, monkeypatch):
        real = builtins.__import__

        def absent(name, *args, **kwargs):
            if name.startswith("matplotlib"):
                raise ImportError(name)
            return real(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", absent)
        assert evaluate.main([str(run_dir), "--patches", "1", "--random=false"]) == 0
        assert "matplotlib is not installed" in capsys.readouterr().out

    def test_training_may_end_with_it(self, images, tmp_path):
        recipe = tmp_path / "tiny.yaml"
        config = replace(CONFIG, eval=replace(CONFIG.eval, enabled=True, patches=(1,)))
        recipe.write_text(cli.to_yaml(config))
        flags = ["--data", str(images / "x-train.npz"), "--run_dir", str(tmp_path / "r")]
        assert train.main(["--config", str(recipe), *flags]) == 0
        assert (tmp_path / "r" / "eval.json").is_file()


class TestRefusals:
    def test_a_missing_test_set_stops_before_training(self, images, tmp_path, capsys):
        recipe = tmp_path / "tiny.yaml"
        recipe.write_text(cli.to_yaml(replace(CONFIG, eval=replace(CONFIG.eval, enabled=True))))
        flags = ["--data", str(images / "x-train.npz"), "--run_dir", str(tmp_path / "r")]
        assert train.main(["--config", str(recipe), *flags, "--test-data", "nowhere.tar"]) == 2
        assert "nowhere.tar" in capsys.readouterr().err and not (tmp_path / "r").exists()

    def test_no_run(self, tmp_path, capsys):
        assert evaluate.main([str(tmp_path)]) == 2
        assert "not a run directory" in capsys.readouterr().err

    def test_no_model_yet(self, tmp_path, capsys):
        (tmp_path / "config.yaml").write_text(cli.to_yaml(CONFIG))
        assert evaluate.main([str(tmp_path)]) == 2
        assert "--resume auto" in capsys.readouterr().err

    @pytest.mark.parametrize("patches", ["3", "0", "1,-4", "x"])
    def test_bags_that_are_no_grids(self, run_dir, capsys, patches):
        assert evaluate.main([str(run_dir), f"--patches={patches}"]) == 2
        assert "patches" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "flags, why",
        [
            (["--patches", "1,4,16", "--grid", "3"], "--grid 3 divides no bag of --patches 1,4,16"),
            (["--grid", "0"], "--grid 0: must be 1 or more"),
            (["--knn_space", "white"], "rooted, whitened, standardized, centered or plain"),
        ],
    )
    def test_readings_that_do_not_exist(self, run_dir, capsys, flags, why):
        assert evaluate.main([str(run_dir), *flags]) == 2
        assert why in capsys.readouterr().err

    def test_other_classes(self, run_dir, images, capsys):
        path = images / "other.npz"
        np.savez(path, images=np.zeros((4, 16, 16, 3), np.uint8), labels=np.array([0, 1, 2, 7]))
        code = evaluate.main([str(run_dir), "--test-data", str(path)])
        assert code == 2 and "other classes" in capsys.readouterr().err


def test_find_test_data(tmp_path):
    for name in ("c10-train.tar", "c10-test.tar", "train.tar"):
        (tmp_path / name).touch()
    for name in ("in/train/a", "in/val/a", "alone/train"):
        (tmp_path / name).mkdir(parents=True)
    find = find_test_data
    assert find(str(tmp_path / "c10-train.tar")) == str(tmp_path / "c10-test.tar")
    assert find(str(tmp_path / "in" / "train")) == str(tmp_path / "in" / "val")
    assert find(str(tmp_path / "train.tar")) is None
    assert find(str(tmp_path / "alone" / "train")) is None
    assert find("demo") == "demo:test" and find("demo:train") == "demo:test"
