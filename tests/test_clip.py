"""CLIP's two towers: the published computation, open_clip's own as an oracle, and what each tower holds."""

from __future__ import annotations

import random
import time

import numpy as np
import open_clip
import pytest
import torch
from conftest import load_fixture, load_json, relative_error
from make_small_model import random_state_dict
from tiny_networks import normal

from modelscope_i2v.errors import ConfigurationError, InvalidInputError
from modelscope_i2v.models.clip import ClipConfig, ClipImageEncoder, ClipTextEncoder, build_clip
from modelscope_i2v.models.config import VIT_H_14

pytestmark = pytest.mark.usefixtures("without_gradients")

TINY = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 56, "layers": 2, "width": 32, "head_width": 16, "patch_size": 28},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 3},
}
TOWERS = {"image": ClipImageEncoder, "text": ClipTextEncoder}


def built(tower: type, model_cfg: dict, seed: int = 0, **given):
    encoder = tower(ClipConfig(model_cfg=model_cfg, **given))
    encoder.model.load_state_dict(random_state_dict(encoder.model, seed), assign=True)
    return encoder.eval()


def whole_clip(model_cfg: dict) -> open_clip.CLIP:
    clip = open_clip.CLIP(**model_cfg)
    clip.load_state_dict(random_state_dict(clip))
    return clip.eval()


def text_states(clip: open_clip.CLIP, tokens: torch.Tensor) -> torch.Tensor:
    """The final LayerNorm's output in open_clip's own text encoding."""
    seen = []
    hook = clip.ln_final.register_forward_hook(lambda module, args, output: seen.append(output))
    clip.encode_text(tokens)
    hook.remove()
    return seen[0]


@pytest.fixture(scope="module")
def image_tower() -> ClipImageEncoder:
    return built(ClipImageEncoder, TINY)


@pytest.fixture(scope="module")
def text_tower() -> ClipTextEncoder:
    return built(ClipTextEncoder, TINY)


# The published computation


def test_image_embedding_is_the_published_one():
    meta, fixture = load_json("meta"), load_fixture("clip")
    encoder = built(ClipImageEncoder, meta["clip"], meta["seed"])
    embedding = encoder(torch.from_numpy(fixture["image"].astype(np.float32)))
    assert embedding.dtype == torch.float32
    assert relative_error(embedding, fixture["image_embedding"]) < 1e-5


def test_text_states_are_the_published_ones():
    meta, fixture = load_json("meta"), load_fixture("clip")
    encoder = built(ClipTextEncoder, meta["clip"], meta["seed"])
    prompts = fixture["prompts"].tolist()
    assert np.array_equal(encoder.tokenize(prompts).numpy(), fixture["tokens"])
    hidden = encoder(prompts)
    assert hidden.shape == (2, 77, 1024)
    assert hidden.dtype == torch.float32
    assert relative_error(hidden[:, ::7, ::16], fixture["text_hidden"]) < 1e-5


def test_full_size_parameters_are_the_published_ones():
    published = load_json("state_dicts")["open_clip"]
    towers = {name: tower(ClipConfig()) for name, tower in TOWERS.items()}
    keys = {}
    for name, tower in towers.items():
        shapes = {key: list(value.shape) for key, value in tower.model.state_dict().items()}
        assert shapes.items() <= published.items()
        assert tower.full_model_keys == published.keys()
        keys[name] = shapes.keys()
    assert keys["image"] == {key for key in published if key.startswith("visual.")}
    assert not keys["image"] & keys["text"]
    assert published.keys() - keys["image"] - keys["text"] == {"text_projection", "logit_scale"}
    assert len(published) == 686


# open_clip's own computation as an oracle


def test_image_embedding_is_open_clips_unnormalised(image_tower):
    image = normal(2, 3, 56, 56)
    embedding = image_tower(image)
    assert relative_error(embedding, whole_clip(TINY).encode_image(image, normalize=False)) < 1e-6
    assert (embedding.norm(dim=1) - 1).abs().min() > 0.1


def test_last_layer_is_open_clips_own():
    encoder = built(ClipTextEncoder, TINY, layer="last")
    texts = ["a cat on a mat", ""]
    assert relative_error(encoder(texts), text_states(whole_clip(TINY), encoder.tokenize(texts))) < 1e-6


def test_penultimate_layer_is_a_clip_with_one_block_less(text_tower):
    fewer = {**TINY, "text_cfg": {**TINY["text_cfg"], "layers": 2}}
    texts = ["a cat on a mat", ""]
    hidden = text_tower(texts)
    assert relative_error(hidden, text_states(whole_clip(fewer), text_tower.tokenize(texts))) < 1e-6
    assert relative_error(built(ClipTextEncoder, TINY, layer="last")(texts), hidden) > 0.01


# Texts


def test_tokens_see_only_what_stands_before_them(text_tower):
    first, second = text_tower(["a cat on mat", "a cat on fire"])
    assert relative_error(first[:4], second[:4]) < 1e-6  # start, a, cat, on
    assert (first[4:] - second[4:]).abs().amax(1).min() > 1e-4


def test_batch_of_two_is_two_singles(text_tower, image_tower):
    texts, images = ["a cat", "two dogs and a much longer text"], normal(2, 3, 56, 56)
    hidden, embeddings = text_tower(texts), image_tower(images)
    for index in range(2):
        assert relative_error(hidden[index], text_tower(texts[index])[0]) < 1e-6
        assert relative_error(embeddings[index], image_tower(images[index : index + 1])[0]) < 1e-6


def test_one_text_is_a_list_of_one(text_tower):
    assert text_tower("a cat").shape == (1, 12, 16)
    assert torch.equal(text_tower("a cat"), text_tower(["a cat"]))
    assert torch.equal(text_tower("a cat"), text_tower(("a cat",)))


def test_long_texts_are_cut_off(text_tower):
    tokens = text_tower.tokenize(["cat " * 500])
    start, end = open_clip.tokenize([""])[0, :2].tolist()
    cat = open_clip.tokenize(["cat"])[0, 1].item()
    assert tokens.tolist() == [[start] + [cat] * 10 + [end]]
    assert torch.equal(text_tower("cat " * 500), text_tower("cat " * 10))
    assert relative_error(text_tower("cat " * 9), text_tower("cat " * 10)) > 1e-3


# What a tower holds


def test_a_tower_holds_only_its_own_parameters(image_tower, text_tower):
    whole = open_clip.CLIP(**TINY)
    assert {name.split(".")[0] for name in image_tower.model.state_dict()} == {"visual"}
    held = sum(value.numel() for value in image_tower.parameters())
    assert held == sum(value.numel() for value in whole.visual.parameters())
    text = {"positional_embedding", "transformer", "token_embedding", "ln_final"}
    assert {name.split(".")[0] for name in text_tower.model.state_dict()} == text
    held += sum(value.numel() for value in text_tower.parameters())
    left_out = whole.text_projection.numel() + whole.logit_scale.numel()
    assert held + left_out == sum(value.numel() for value in whole.parameters())


@pytest.mark.parametrize("name", TOWERS)
def test_nothing_of_a_tower_stays_on_the_meta_device(name):
    encoder = built(TOWERS[name], TINY)
    tensors = [*encoder.parameters(), *encoder.buffers()]
    assert tensors and {tensor.device.type for tensor in tensors} == {"cpu"}


@pytest.mark.parametrize("name", TOWERS)
def test_device_is_the_parameters_and_assigning_it_moves_them(name):
    encoder = built(TOWERS[name], TINY)
    assert encoder.device == torch.device("cpu")
    encoder.device = "meta"
    assert encoder.device == torch.device("meta")
    assert {value.device.type for value in encoder.parameters()} == {"meta"}
    moved = built(TOWERS[name], TINY)
    moved.model.to("meta")  # as client code moves it
    assert moved.device == torch.device("meta")


@pytest.mark.parametrize("name", TOWERS)
def test_computes_in_the_parameters_dtype_and_returns_float32(name):
    encoder = built(TOWERS[name], TINY)
    given = normal(1, 3, 56, 56) if name == "image" else "a cat"
    expected = encoder(given)
    encoder.bfloat16()
    assert encoder.dtype == torch.bfloat16
    output = encoder(given)
    assert output.dtype == torch.float32
    assert 0 < relative_error(output, expected) < 0.05


def test_sizes_of_an_architecture():
    assert (ClipConfig().embed_dim, ClipConfig().image_size, ClipConfig().text_width) == (1024, 224, 1024)
    tiny = ClipConfig(model_cfg=TINY)
    assert (tiny.embed_dim, tiny.image_size, tiny.text_width) == (24, 56, 16)
    bare = ClipConfig(model_cfg={"embed_dim": 8, "vision_cfg": {}, "text_cfg": {}})
    assert bare.image_size == open_clip.CLIPVisionCfg().image_size
    assert bare.text_width == open_clip.CLIPTextCfg().width


# Refusals


@pytest.mark.parametrize("shape", [(3, 56, 56), (1, 1, 56, 56), (1, 3, 224, 224)])
def test_images_that_do_not_fit_are_refused(image_tower, shape):
    with pytest.raises(InvalidInputError) as refusal:
        image_tower(torch.zeros(shape))
    assert str(refusal.value) == f"CLIP: images must be [B, 3, 56, 56], got {list(shape)}"


@pytest.mark.parametrize("texts", [[], ["a cat", 3], [b"a cat"], [["a cat"]]])
def test_texts_that_are_none_are_refused(text_tower, texts):
    with pytest.raises(InvalidInputError) as refusal:
        text_tower(texts)
    assert str(refusal.value) == f"CLIP: a text or a list of texts is needed, got {texts!r}"


def test_unknown_layer_is_refused():
    with pytest.raises(ConfigurationError) as refusal:
        ClipConfig(layer="first")
    assert str(refusal.value) == "embedder: layer: got 'first', allowed is one of penultimate, last"


def test_unknown_architecture_is_refused():
    with pytest.raises(ConfigurationError, match="open_clip .* has no architecture 'ViT-Q-99'"):
        ClipConfig(arch="ViT-Q-99")


def test_architecture_elsewhere_than_in_open_clip_is_refused():
    """A folder or a hub behind open_clip's prefixes is no architecture's name, and is not looked for."""
    with pytest.raises(ConfigurationError, match="local-dir:/no/such/folder"):
        ClipConfig(arch="local-dir:/no/such/folder")


def test_architecture_without_a_text_transformer_of_its_own_is_refused():
    with pytest.raises(ConfigurationError, match="'xlm-roberta-base-ViT-B-32' has no CLIP text transformer"):
        ClipConfig(arch="xlm-roberta-base-ViT-B-32")


@pytest.mark.parametrize(
    "model_cfg", [{}, {"embed_dim": 64}, {"embed_dim": 64, "vision_cfg": {}}, "ViT-H-14", [1, 2], 3]
)
def test_incomplete_model_configuration_is_refused(model_cfg):
    with pytest.raises(ConfigurationError) as refusal:
        ClipConfig(model_cfg=model_cfg)
    assert str(refusal.value) == (
        f"embedder: model_cfg: an object with embed_dim, text_cfg, vision_cfg is needed, got {model_cfg!r}"
    )


@pytest.mark.parametrize("name", ["vision_cfg", "text_cfg"])
@pytest.mark.parametrize("value", [5, [], "large", None])
def test_model_configuration_of_wrong_types_is_refused(name, value):
    with pytest.raises(ConfigurationError, match="embedder: "):
        config = ClipConfig(model_cfg={**TINY, name: value})
        assert config.image_size and config.text_width  # which the settings ask for before anything is built


def test_model_that_open_clip_cannot_build_is_refused():
    config = ClipConfig(model_cfg={**TINY, "text_cfg": {**TINY["text_cfg"], "heads": 7}})
    with pytest.raises(ConfigurationError, match="embedder: open_clip cannot build this model: "):
        build_clip(config)


# What a file may ask for


@pytest.mark.parametrize(
    "section, name, value",
    [
        ("vision_cfg", "timm_model_name", "hf-hub:someone/something"),
        ("vision_cfg", "timm_model_pretrained", True),
        ("text_cfg", "hf_tokenizer_name", "someone/something"),
        ("text_cfg", "no_such_setting", 1),
    ],
)
def test_keys_that_are_no_architecture_are_refused(section, name, value):
    with pytest.raises(ConfigurationError, match=f"embedder: model_cfg: {section}: {name} is not allowed"):
        ClipConfig(model_cfg={**TINY, section: {**TINY[section], name: value}})


@pytest.mark.parametrize(
    "section, name, value",
    [
        ("text_cfg", "layers", 60_000), ("vision_cfg", "layers", 0), ("vision_cfg", "layers", [60_000]),
        ("vision_cfg", "width", 0), ("vision_cfg", "width", "wide"), ("vision_cfg", "image_size", [224, 224]),
        ("text_cfg", "context_length", True), ("text_cfg", "mlp_ratio", float("nan")),
    ],
)  # fmt: skip
def test_sizes_that_no_network_has_are_refused(section, name, value):
    with pytest.raises(ConfigurationError, match=f"embedder: model_cfg: {section}: {name}: got "):
        ClipConfig(model_cfg={**TINY, section: {**TINY[section], name: value}})


@pytest.mark.parametrize("size", [0, -1, 10**9, "64", None])
def test_embedding_sizes_that_cannot_be_are_refused(size):
    with pytest.raises(ConfigurationError, match="embedder: model_cfg: embed_dim: got"):
        ClipConfig(model_cfg={**TINY, "embed_dim": size})


def test_the_published_architecture_is_open_clips():
    assert VIT_H_14 == open_clip.get_model_config("ViT-H-14")


# Long texts

LONG_TEXTS = {
    "words": " ".join(f"word{n} of a, prompt!" for n in range(2000)),
    "blanks first": " \n\t" * 20_000 + "a cat",
    "one word": "abcdefghijklmnopqrstuvwxyz" * 300,
    "the longest tokens": "thinkbigsundaywithmarsha" * 400,
    "one letter": "a" * 9000,
    "emoji": "\N{FACE WITH TEARS OF JOY}" * 6000,
    "entities": "&lt;caf&eacute;&gt; &amp;amp; " * 1000,
    "capitals and accents": "\u00c9T\u00c9 \u0130stanbul " * 1000,
}


@pytest.mark.parametrize("name", LONG_TEXTS)
def test_cutting_a_long_text_changes_no_token(name):
    config = ClipConfig(model_cfg={**TINY, "text_cfg": {**TINY["text_cfg"], "context_length": 77}})
    encoder, text = ClipTextEncoder(config), LONG_TEXTS[name]
    for part in (text, text[:4000], text[:200]):
        assert torch.equal(encoder.tokenize([part]), open_clip.tokenize([part], context_length=77))


def test_a_word_of_a_million_letters_takes_no_time():
    encoder = ClipTextEncoder(ClipConfig(model_cfg=TINY))
    start = time.process_time()
    encoder.tokenize(["".join(random.Random(0).choices("abcdefgh", k=1_000_000))])
    assert time.process_time() - start < 5
