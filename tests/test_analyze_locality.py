"""Claim 4: what position and source image can be read from, on spaces whose answer is known."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bagssl_fast import cli
from bagssl_fast.analyze import locality as lo
from bagssl_fast.analyze.models import Context
from bagssl_fast.analyze.study import Result

PLACES = lo.GRID**2
IMAGES = 30


@pytest.fixture(scope="module")
def patches() -> lo.Patches:
    """Spaces of which one knows the place alone, one the image alone, one nothing."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.arange(IMAGES * PLACES)
    image, position = rows // PLACES, rows % PLACES
    noise = 0.01 * torch.randn(len(rows), PLACES, generator=generator)
    own = torch.randn(IMAGES, 24, generator=generator)[image]
    features = {
        "place": F.one_hot(position, PLACES).float() + noise,
        "image": own + 0.01 * torch.randn(own.shape, generator=generator),
        "nothing": torch.randn(len(rows), 24, generator=generator),
    }
    pixels = torch.arange(len(rows)).byte()[:, None, None, None].expand(-1, 4, 4, 3)
    return lo.Patches(pixels, image, position, features)


def test_a_space_of_places(patches):
    measured = lo.measure(patches, "place").means()
    assert measured["position"] == 1.0
    assert measured["neighbor_position"] == pytest.approx(1.0, abs=0.01)
    assert measured["nearer"] < 0.6  # corners of one image stand at different places


def test_a_space_of_images(patches):
    measured = lo.measure(patches, "image").means()
    assert measured["nearer"] == 1.0
    assert measured["nearest"] == 1.0
    assert measured["position"] < 0.15


def test_a_space_of_nothing_is_at_chance(patches):
    measured, chance = lo.measure(patches, "nothing").means(), lo.chance(IMAGES)
    assert measured["position"] == pytest.approx(chance["position"], abs=0.07)
    assert measured["neighbor_position"] == pytest.approx(chance["neighbor_position"], abs=0.03)
    assert measured["nearer"] == pytest.approx(0.5, abs=0.06)
    assert measured["nearest"] < 0.1


def test_source_image_is_what_loops_say(patches):
    x = patches.features["image"] + 2 * patches.features["nothing"]
    nearer, nearest = lo.source_image(x, patches.position, patches.image)
    corner = [i for i in range(len(x)) if i % PLACES in lo.CORNERS]
    rows = lo.directions(x[corner])
    source = patches.image[corner]
    shares, firsts = [], []
    for i in range(len(rows)):
        cosine = rows @ rows[i]
        others = [j for j in range(len(rows)) if j != i]
        own = [j for j in others if source[j] == source[i]]
        foreign = torch.tensor([j for j in others if source[j] != source[i]])
        shares.append(torch.stack([(cosine[foreign] < cosine[j]).float().mean() for j in own]))
        firsts.append(max(others, key=lambda j, cosine=cosine: cosine[j]) in own)
    assert torch.allclose(nearer, torch.stack([share.mean() for share in shares]), atol=1e-5)
    assert nearest.tolist() == firsts


def test_neighbors_are_of_other_images_nearest_first(patches):
    x, queries = patches.features["image"], torch.tensor([0, 17, 100])
    found = lo.neighbors(x, patches.image, queries, 5)
    assert (patches.image[found] != patches.image[queries][:, None]).all()
    rows = lo.directions(x)
    cosine = (rows[queries][:, None] * rows[found]).sum(dim=2)
    assert (cosine[:, :-1] >= cosine[:, 1:]).all()
    others = (rows[queries] @ rows.T).masked_fill(
        patches.image[queries][:, None] == patches.image, -2
    )
    assert torch.allclose(cosine[:, 0], others.max(dim=1).values)


def test_the_gallery_shows_an_image_once():
    image = torch.tensor([0, 0, 1, 1, 2, 2])
    found = torch.tensor([[1, 0, 5, 4, 2], [3, 2, 4, 0, 1]])
    assert lo.one_per_image(found, image, 2).tolist() == [[1, 5], [3, 4]]


def test_mosaic_puts_patches_where_it_says(patches):
    canvas, middles = lo.mosaic(patches.pixels, [torch.tensor([[3], [5]]), torch.tensor([[7, 8]])])
    assert canvas.shape == (2 * 5 - 1, 4 + 2 + 4 + 1 + 4, 3)
    assert canvas[0, 0, 0] == 3 and canvas[5, 0, 0] == 5
    assert canvas[0, 6, 0] == 7 and canvas[0, 11, 0] == 8
    assert canvas[4, 0, 0] == 255 and canvas[5, 6, 0] == 255
    assert middles == [2, 10.5]


def measured(**spaces: tuple[float, float]) -> dict[str, list[lo.Measured]]:
    """Two seeds of 50 images: means as given, around which h and z scatter alike."""
    scatter = 0.2 * torch.randn(50, generator=torch.Generator().manual_seed(0))
    result = {}
    for name, (place, nearer) in spaces.items():
        one = lo.Measured(place + scatter, scatter, nearer + scatter, scatter)
        two = lo.Measured(place + scatter.flip(0), scatter, nearer - scatter, scatter)
        result[name.replace("_", " ")] = [one, two]
    return result


def test_judgement_follows_the_numbers():
    random = {"random_h": (0.3, 0.6), "random_z": (0.3, 0.6)}
    good = measured(trained_h=(0.5, 0.7), trained_z=(0.3, 0.8), **random)
    verdict, text = lo.judge(good, 1200)
    assert verdict == "holds"
    assert "contains more about the position" in text and "training raises this" in text
    bad = measured(trained_h=(0.2, 0.7), trained_z=(0.4, 0.8), **random)
    verdict, text = lo.judge(bad, 1200)
    assert verdict == "does not hold"
    assert "contains less about the position" in text and "training lowers this" in text
    same = measured(trained_h=(0.3, 0.7), trained_z=(0.3, 0.8), **random)
    assert lo.judge(same, 1200)[0] == "undecided"


def test_a_quick_study_gives_a_result(tmp_path, monkeypatch):
    monkeypatch.setattr(lo, "QUICK_IMAGES", 24)
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 255, (96, 32, 32, 3)).astype(np.uint8)
    np.savez(tmp_path / "train.npz", images=pixels, labels=np.arange(96) % 3)
    text = """
max_steps: 2
batch_size: 16
threads: 1
bag: {patches: 2}
augment: {size: 16, scale: [0.25, 0.25], blur_prob: 0.0, solarize_prob: 0.0}
encoder: {name: patchnet, width: 4, options: {stem: 8, feature_dim: 16}}
head: {hidden: 16, out: 16, num_layers: 2}
eval: {max_test_images: 24}
"""
    (tmp_path / "tiny.yaml").write_text(text)
    base = replace(cli.load(tmp_path / "tiny.yaml"), data=str(tmp_path / "train.npz"))
    result = lo.run(Context(base, tmp_path, quick=True))
    assert Result.from_json(result.to_json()) == result
    assert result.claim == 4
    assert set(result.numbers) >= {"trained h", "trained z", "random h", "random z", "images"}
    for figure in result.figures:
        assert (tmp_path / figure.path).stat().st_size > 5000
