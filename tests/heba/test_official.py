"""Checkpoints of the official prompt learners, to ours and back."""

import shlex
import subprocess
import sys

import pytest
import torch

from heba import artifact, methods
from heba.clip.towers import text_tower
from heba.fit import official
from tests.heba import checkpoints
from tests.heba.test_methods import CONTEXT, N_CLASSES, Data

M = 4
META_NET = {f"meta_net.linear{i}.{part}" for i in (1, 2) for part in ("weight", "bias")}
BLOCKS = [f"transformer.resblocks.{j}.VPT_shallow" for j in (1, 2)]
# The settings of a small model; of these, what a checkpoint does not tell; and its official names by ours, where
# they differ.
METHODS = {
    "coop": ({"context": M, "position": "middle"}, {"position": "middle"}, {}),
    "cocoop": ({"words": None, "context": M}, {}, {}),
    "kgcoop": ({"words": "X X X"}, {}, {}),
    "prograd": ({"words": None, "context": M}, {}, {}),
    "tcp": ({"after": 2, "text": "{} drawn."}, {"after": 2, "text": "{} drawn."}, {}),
    "maple": (
        {"context": 2, "depth": 3},
        {},
        {
            "text.0": "prompt_learner.ctx",
            "text.1": "prompt_learner.compound_prompts_text.0",
            "text.2": "prompt_learner.compound_prompts_text.1",
            "project.0.weight": "prompt_learner.proj.weight",
            "project.0.bias": "prompt_learner.proj.bias",
            "project.1.weight": "prompt_learner.compound_prompt_projections.0.weight",
            "project.1.bias": "prompt_learner.compound_prompt_projections.0.bias",
            "project.2.weight": "prompt_learner.compound_prompt_projections.1.weight",
            "project.2.bias": "prompt_learner.compound_prompt_projections.1.bias",
        },
    ),
    "promptsrc": (
        {"words": None, "text_context": 5, "image_context": 3, "text_depth": 3, "image_depth": 2},
        {},
        {
            "text.0": "prompt_learner.ctx",
            "text.1": f"text_encoder.{BLOCKS[0]}",
            "text.2": f"text_encoder.{BLOCKS[1]}",
            "image.0": "image_encoder.VPT",
            "image.1": f"image_encoder.{BLOCKS[0]}",
        },
    ),
    "vpt": (
        {"context": 3, "depth": 2},
        {},
        {"image.0": "image_encoder.VPT", "image.1": f"image_encoder.{BLOCKS[0]}"},
    ),
}
LEFT_OUT = ("image_encoder.conv1.weight", "text_encoder.ln_final.bias", "prompt_learner.ZS_image_encoder.proj")
every_method = pytest.mark.parametrize("name", METHODS)


class Learned:
    """A model of a method with values at random in fp16, as a whole official one has them, and its checkpoint."""

    def __init__(self, name, folder, **settings):
        self.data, self.path = Data(folder), folder / "model.pth.tar-7"
        own, self.given, self.names = METHODS[name]
        self.settings = methods.part(name, "settings").Settings(**own | settings)
        self.method, self.convert = methods.part(name, "method"), methods.part(name, "convert")
        self.model = self.build(self.settings)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in self.method.trained(self.model).parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator).half())
        self.texts = self.convert.texts_of(self.model, self.data.classes, self.settings)

    def build(self, settings):
        return self.method.build(self.data.clip, N_CLASSES, settings, seed=0)

    def tensors(self):
        return self.method.trained(self.model).state_dict()

    def state(self):
        """What the official code has, with the embeddings of its texts and with weights of CLIP."""
        state = {self.names.get(name, name): tensor.half() for name, tensor in self.tensors().items()}
        prefix = "prompt_learner." if self.names else ""
        if self.texts is not None:
            behind = 1 + next(tensor for name, tensor in state.items() if name.endswith("ctx")).shape[-2]
            embeddings = self.texts.embeddings
            pads = embeddings.new_zeros(N_CLASSES, CONTEXT - embeddings.shape[1], embeddings.shape[2])
            state[f"{prefix}token_prefix"] = embeddings[:, :1].half()
            state[f"{prefix}token_suffix"] = torch.cat([embeddings, pads], dim=1)[:, behind:].half()
        if self.names:
            state |= {name: torch.ones(2).half() for name in LEFT_OUT} | {"logit_scale": torch.ones(())}
        return state

    def checkpoint(self, **changed):
        """The official checkpoint, some of whose tensors are changed or, if None, left out."""
        state = {k: v for k, v in (self.state() | changed).items() if v is not None}
        checkpoints.save(self.path, state, epoch=7)
        return official.read(self.path)

    def check_texts(self, checkpoint):
        official.check_texts(checkpoint, self.texts, text_tower(self.data.clip).context_length)

    def logits(self, model, settings):
        classifier = self.method.classifier(model, self.data.classes, settings, True)
        torch.manual_seed(0)
        return self.method.logits(model, classifier, Data(self.path.parent).test_images())


@pytest.fixture
def learned(tmp_path):
    """Makes `Learned`."""
    return lambda name, **settings: Learned(name, tmp_path, **settings)


@every_method
def test_an_official_checkpoint_gives_the_same_logits(name, learned):
    ours = learned(name)
    checkpoint = ours.checkpoint()
    tensors, settings = ours.convert.from_official(checkpoint, ours.given)
    assert settings == ours.settings.model_copy(update={"epochs": 7}).model_dump()
    settings = type(ours.settings)(**settings)
    model = ours.build(settings)
    artifact.load_tensors(ours.method.trained(model), tensors, "converted")
    assert torch.equal(ours.logits(model, settings), ours.logits(ours.model, ours.settings))
    if ours.texts is not None:
        ours.check_texts(checkpoint)


@every_method
def test_there_and_back_nothing_is_lost(name, learned, tmp_path):
    """What the official code loads has names of its own alone, which it looks up with strict=False."""
    official_settings = {"after": 8} if name == "tcp" else {}
    ours = learned(name)
    settings = ours.settings.model_copy(update=official_settings)
    path = ours.convert.to_official(ours.tensors(), settings, None, tmp_path / "run", tmp_path)
    assert path == tmp_path / "run" / ours.convert.MODEL / f"model.pth.tar-{settings.epochs}"
    state = torch.load(path, weights_only=True)["state_dict"]
    assert state.keys() <= ours.state().keys()
    back, _ = ours.convert.from_official(official.read(path), ours.given)
    assert back.keys() == ours.tensors().keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in ours.tensors().items())


@every_method
def test_the_tensors_tell_the_method(name, learned):
    tensors = learned(name).checkpoint().tensors
    known = [other for other in methods.names() if methods.has_part(other, "convert")]
    fitting = [other for other in known if methods.part(other, "convert").fits(tensors)]
    shared = ["coop", "kgcoop", "prograd"]
    assert fitting == (shared if name in shared else [name])


def test_the_epochs_are_those_of_the_shots(learned, tmp_path):
    for name in ("coop", "prograd"):
        ours = learned(name, epochs=9, epochs_few=8, epochs_one=3)
        for shots, epochs in ((16, 9), (2, 8), (1, 3), (None, 9)):
            path = ours.convert.to_official(ours.tensors(), ours.settings, shots, tmp_path, tmp_path)
            assert official.read(path).epoch == epochs


def test_a_context_per_class_is_coops(learned):
    ours = learned("coop", per_class=True)
    checkpoint = ours.checkpoint()
    for name in ("coop", "kgcoop", "prograd"):
        assert methods.part(name, "convert").fits(checkpoint.tensors) == (name == "coop")
    tensors, settings = ours.convert.from_official(checkpoint, {})
    assert settings["per_class"]
    assert tensors["ctx"].shape == (N_CLASSES, M, 16)
    with pytest.raises(ValueError, match=r"ctx has shape \(3, 4, 16\), which is no context"):
        methods.part("kgcoop", "convert").from_official(checkpoint, {})


def test_words_that_stay_behind_the_context_must_be_given(learned):
    """A comma is a token, so that one word more than the official code counts stays."""
    words = "a drawing, a photo of"
    ours = learned("prograd", words=words, context=6)
    checkpoint = ours.checkpoint()
    ours.check_texts(checkpoint)
    assert ours.convert.from_official(checkpoint, {"words": words})[1]["words"] == words
    settings = type(ours.settings)(**ours.convert.from_official(checkpoint, {})[1])
    ours.texts = ours.convert.texts_of(ours.build(settings), ours.data.classes, settings)
    with pytest.raises(ValueError, match=r"model\.pth\.tar-7: the text of its class 1 was another one"):
        ours.check_texts(checkpoint)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "vpt"])
def test_other_texts_are_found(name, learned):
    ours = learned(name)
    checkpoint = ours.checkpoint()
    suffix = checkpoint.suffix
    for wrong, message in (
        (suffix[:2], "was trained on 2 classes, and these are 3; see --dataset"),
        (suffix[[0, 2, 1]], "the text of its class 2 was another one"),
        (suffix * float("nan"), "the text of its class 1 was another one"),
        (suffix[..., :3], "not of this backbone's texts"),
        (suffix[0], "not of this backbone's texts"),
        (torch.cat([suffix] * 2, dim=1), "not of this backbone's texts"),
    ):
        with pytest.raises(ValueError, match=message):
            ours.check_texts(checkpoint._replace(suffix=wrong))
    ours.check_texts(checkpoint._replace(suffix=None))


@every_method
def test_what_is_missing_or_unknown_is_listed(name, learned):
    ours = learned(name)
    missing = next(iter(ours.names.values()), "ctx")
    checkpoint = ours.checkpoint(**{missing: None, "more": torch.ones(1)})
    found = f"missing {missing.removeprefix('prompt_learner.')}\n +unexpected more"
    with pytest.raises(ValueError, match=rf"model\.pth\.tar-7: not what .* trains:\n +{found}"):
        ours.convert.from_official(checkpoint, {})


@every_method
def test_settings_that_can_not_be_are_refused(name, learned):
    ours = learned(name)
    checkpoint = ours.checkpoint()
    for given, message in (
        ({"epochs": 8}, "tells its settings itself: epochs is 7"),
        ({"nothing": 1}, "settings: nothing: Extra inputs are not permitted"),
        ({"lr": -1.0}, "settings: lr: Input should be greater"),
    ):
        with pytest.raises(ValueError, match=rf"model\.pth\.tar-7: {message}"):
            ours.convert.from_official(checkpoint, given)


def test_a_context_of_another_shape_is_refused(learned):
    ours = learned("coop")
    tensors, settings = ours.convert.from_official(ours.checkpoint(ctx=torch.ones(M, 15)), {})
    model = ours.build(type(ours.settings)(**settings))
    with pytest.raises(ValueError, match=r"ctx has shape \(4, 15\), the model needs \(4, 16\)"):
        artifact.load_tensors(ours.method.trained(model), tensors, "here")
    for shape in ((), (4,), (1, 2, 3, 4)):
        checkpoint = ours.checkpoint(ctx=torch.ones(shape))
        assert not ours.convert.fits(checkpoint.tensors)
        with pytest.raises(ValueError, match="which is no context"):
            ours.convert.from_official(checkpoint, {})


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("cocoop", {"reduction": 8}, "reduction 16 and no other"),
        ("tcp", {}, "official code has after 8 and no other"),
        ("tcp", {"context": 2, "after": 1}, "context 4, after 8"),
        ("vpt", {"words": "a drawing of"}, "the words 'a photo of a' and no other"),
    ],
)
def test_what_the_official_code_can_not_have_is_refused(name, settings, message, learned, tmp_path):
    ours = learned(name, **settings)
    with pytest.raises(ValueError, match=message):
        ours.convert.to_official(ours.tensors(), ours.settings, None, tmp_path / "run", tmp_path)
    assert not (tmp_path / "run").exists()


def test_a_pickled_schedule_is_refused_with_a_remedy(learned):
    """As after a warm-up. The remedy is a command, which leaves the tensors alone."""
    ours = learned("kgcoop")
    checkpoints.save(ours.path, ours.state(), epoch=7, warmup=True)
    with pytest.raises(ValueError, match=r"holds torch\.optim\.lr_scheduler\.CosineAnnealingLR; ") as refused:
        official.read(ours.path)
    assert len(str(refused.value).splitlines()) == 1
    command = shlex.split(str(refused.value).partition("keep its tensors alone: ")[2])
    assert command[0] == "python"
    subprocess.run([sys.executable, *command[1:]], check=True)
    checkpoint = official.read(ours.path.with_name("model.pth.tar-7.tensors"))
    assert checkpoint.content.keys() == {"state_dict", "epoch"}
    wanted = ours.checkpoint()
    assert (checkpoint.epoch, checkpoint.tensors.keys()) == (7, wanted.tensors.keys())
    assert torch.equal(checkpoint.tensors["ctx"], wanted.tensors["ctx"])
    assert torch.equal(checkpoint.suffix, wanted.suffix)


class Evil:
    def __reduce__(self):
        return print, ("run",)


def test_code_in_a_checkpoint_is_refused_and_never_run(tmp_path, capsys):
    path = tmp_path / "model.pth.tar-1"
    torch.save({"state_dict": {}, "epoch": 1, "extra": Evil()}, path)
    with pytest.raises(ValueError, match=r"model\.pth\.tar-1: not a checkpoint of tensors .* it holds \S*print$"):
        official.read(path)
    assert capsys.readouterr().out == ""


def test_what_is_no_official_checkpoint_is_named(tmp_path):
    path = tmp_path / "c"
    with pytest.raises(ValueError, match=r"no file .*c;"):
        official.read(path)
    for content, message in (
        (b"junk", "not a checkpoint of tensors and numbers alone: it is of another kind or damaged$"),
        (b"# A text\n", "it is of another kind or damaged$"),
        ({"weights": 1}, "no state_dict"),
        ({"state_dict": {}, "epoch": True}, "no state_dict and epoch"),
        ({"state_dict": {"a": 1}, "epoch": 1}, "a is no tensor"),
    ):
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        with pytest.raises(ValueError, match=message) as error:
            official.read(path)
        assert str(path) in str(error.value)
