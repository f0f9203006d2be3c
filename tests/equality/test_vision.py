"""Vision models, as TRL tests them, made by configuration: images travel with their rows; the gradient is TRL's."""

import copy

import pytest
import torch
from datasets import Dataset
from harness import assert_same_gradients, graded, question, train
from PIL import Image
from tiny_models import TINY
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    SiglipVisionConfig,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from trl import GRPOTrainer

from trl_ext import read_interference
from trl_ext.advantages.prompt_keys import prompt_key, prompt_text
from trl_ext.compat import TRL_HAS_HEAD
from trl_ext.tasks.small_policy import build_tokenizer

SIDE, PATCH = 16, 8
TEMPLATE = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}="
)
TEXT = {**TINY, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": SIDE, "patch_size": PATCH}


def llava(folder):
    tokenizer = build_tokenizer((1, 4))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    processor = LlavaProcessor(
        image_processor=LlavaImageProcessorPil(size={"height": SIDE, "width": SIDE}, do_center_crop=False),
        tokenizer=tokenizer,
        patch_size=PATCH,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE.replace("IMAGE", "<image>"),
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**TEXT, vocab_size=len(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="full",
    )
    return save(folder, LlavaForConditionalGeneration, config, processor)


def save(folder, model_class, config, processor):
    torch.manual_seed(0)
    model = model_class(config)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.save_pretrained(folder)
    return processor


def gemma3(folder):
    """With token types, by which its attention sees a picture whole."""
    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    build_tokenizer((1, 4)).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, extra_special_tokens=names)
    processor = Gemma3Processor(
        image_processor=Gemma3ImageProcessorPil(size={"height": SIDE, "width": SIDE}),
        tokenizer=tokenizer,
        image_seq_length=4,
        chat_template=TEMPLATE.replace("IMAGE", "<start_of_image>"),
    )
    config = Gemma3Config(
        vision_config=SiglipVisionConfig(**VISION),
        mm_tokens_per_image=4,
        text_config=Gemma3TextConfig(**TEXT, vocab_size=len(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image_soft_token>"),
        boi_token_index=tokenizer.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("<end_of_image>"),
    )
    return save(folder, Gemma3ForConditionalGeneration, config, processor)


MODELS = {"llava": llava, "gemma3": gemma3}  # Qwen-VL's processor needs torchvision


def pictures(count):
    return [Image.new("RGB", (SIDE, SIDE), (40 * i % 256, 90 * i % 256, 200 - 20 * i)) for i in range(count)]


def gradients(model, processor, folder, *, images, **options):
    rows = {"prompt": [question(f"What is {i}?") for i in range(8)]}
    if images:
        rows["image"] = pictures(8)
    options |= {"gradient_accumulation_steps": 2, "learning_rate": 0.01, "max_grad_norm": 0.0}
    options |= {"generation_kwargs": None, "processing_class": copy.deepcopy(processor)}
    return train(model, folder, graded, Dataset.from_dict(rows), **options).recorder.gradients


@pytest.mark.skipif(not TRL_HAS_HEAD, reason="TRL itself fails on these tiny models before 1.15")
@pytest.mark.parametrize("images", [True, False], ids=["images", "text alone"])
@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_is_trls(name, images, tmp_path):
    model, keys = tmp_path / "model", []
    processor = MODELS[name](model)
    theirs = gradients(model, processor, tmp_path / "trl", images=images, trainer_class=GRPOTrainer)
    for skipping in (True, False):
        options = {"skip_zero_advantage": skipping, "interference_every": 1, "interference_dim": 0}
        assert_same_gradients(gradients(model, processor, tmp_path / str(skipping), images=images, **options), theirs)
        records = read_interference(tmp_path / str(skipping))
        assert len(records) == 2
        for record in records:
            assert record.metrics["interference/sketch_check"] == pytest.approx(1, abs=1e-3)
            assert len(set(record.prompt_key_P.tolist())) == len(record.prompt_key_P)
            keys.append(sorted(record.prompt_key_P.tolist()))
    assert keys[:2] == keys[2:], "a prompt's key is its own, not this run's"


def test_a_prompts_key_and_text():
    one, same, other = (Image.new("RGB", (4, 4), color) for color in ((1, 2, 3), (1, 2, 3), (3, 2, 1)))

    def asked(image):
        return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What?"}]}]

    assert prompt_key(asked(one)) == prompt_key(asked(same)) != prompt_key(asked(other))
    assert prompt_key(asked(torch.ones(3))) == prompt_key(asked(torch.ones(3))) != prompt_key(asked(torch.zeros(3)))
    assert prompt_text(asked(one)) == "[image] What?"
    for prompt, text in (([], ""), ([{"role": "user", "content": None}], ""), ([{"role": "user"}], ""), ("a", "a")):
        assert prompt_text(prompt) == text
        assert isinstance(prompt_key(prompt), int)
