"""What a prompt gets does not depend on its neighbours, and equals transformers' own generation."""

from __future__ import annotations

import pytest
import torch
from transformers import Gemma2Config, GPT2Config, MambaConfig, MistralConfig

from affina.errors import ModelError
from affina.models import generate as generation
from affina.models.adapters import adapter_disabled, attach_adapter
from affina.models.forward import isolation_of
from affina.models.generate import generate, stream
from tests.models.test_forward import COMMON, SSM
from tests.models.tiny import VOCABULARY, qwen3_config, random_model, randomize_adapter

CONFIGS = {
    "qwen3": qwen3_config(),
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=64, n_layer=2, n_head=4),
    "mistral with a window": MistralConfig(**COMMON, sliding_window=6),
    "gemma2 with soft caps": Gemma2Config(
        **COMMON, head_dim=16, sliding_window=6, final_logit_softcapping=3.0, attn_logit_softcapping=2.0
    ),
    "mamba": MambaConfig(**SSM, pad_token_id=None, bos_token_id=None, eos_token_id=None),
}


def prompts(count=7, longest=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    return [torch.randint(0, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize("packed_attention", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_reply_does_not_depend_on_the_batch(name, packed_attention):
    model = random_model(CONFIGS[name])
    if packed_attention:
        isolation_of(model)
    options = {"max_new_tokens": 9, "stop_ids": [3]}
    together = generate(model, prompts(), batch_size=7, **options)
    assert together == generate(model, prompts(), batch_size=2, **options)
    assert together == [generate(model, [prompt], **options)[0] for prompt in prompts()]


def test_a_batch_that_memory_does_not_hold_is_cut_with_the_same_replies(monkeypatch):
    model, options = random_model(qwen3_config()), {"max_new_tokens": 5, "stop_ids": [3]}
    expected = generate(model, prompts(), batch_size=7, **options)
    sizes = []
    continue_batch = generation._continue_batch

    def on_a_small_card(model, texts, *arguments):
        sizes.append(len(texts))
        if len(texts) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        continue_batch(model, texts, *arguments)

    monkeypatch.setattr(generation, "_continue_batch", on_a_small_card)
    limit = 2
    assert generate(model, prompts(), batch_size=7, **options) == expected
    assert sizes == [7, 4, 2, 2, 2, 1]
    limit = 0
    with pytest.raises(torch.OutOfMemoryError):
        generate(model, prompts(), batch_size=7, **options)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_token_is_the_likeliest_after_all_tokens_before_it(name):
    model = random_model(CONFIGS[name])
    for prompt, reply in zip(prompts(3), generate(model, prompts(3), max_new_tokens=6, stop_ids=[]), strict=True):
        tokens = list(prompt)
        for token in reply:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
            # A tie within float32 rounding may fall either way.
            assert logits[token] >= logits.max() - 1e-4
            tokens.append(token)


def test_a_stream_is_the_batch_one_token_at_a_time():
    model = random_model(qwen3_config())
    for options in ({}, {"temperature": 0.8, "top_p": 0.9, "seed": 4}):
        prompt = prompts()[0]
        batch = generate(model, [prompt], max_new_tokens=9, stop_ids=[3], **options)[0]
        assert list(stream(model, prompt, max_new_tokens=9, stop_ids=[3], **options)) == batch


def test_generation_ends_at_a_stop_token_and_leaves_it_out():
    model = random_model(qwen3_config())
    free = generate(model, prompts(), max_new_tokens=9, stop_ids=[])
    stop = free[0][0]
    stopped = generate(model, prompts(), max_new_tokens=9, stop_ids=[stop])
    for full, cut in zip(free, stopped, strict=True):
        end = full.index(stop) if stop in full else len(full)
        assert cut == full[:end]


def test_sampling_repeats_with_its_seed_and_differs_with_another():
    model = random_model(qwen3_config())
    options = {"max_new_tokens": 12, "stop_ids": [], "temperature": 1.0}
    first = generate(model, prompts(), seed=1, batch_size=7, **options)
    torch.manual_seed(99)
    assert first == generate(model, prompts(), seed=1, batch_size=3, **options)
    assert first != generate(model, prompts(), seed=2, **options)


def test_a_tiny_top_p_is_greedy():
    model = random_model(qwen3_config())
    greedy = generate(model, prompts(), max_new_tokens=9, stop_ids=[])
    assert generate(model, prompts(), max_new_tokens=9, stop_ids=[], temperature=1.0, top_p=1e-6) == greedy


def test_sampled_frequencies_are_the_probabilities():
    model = random_model(qwen3_config(vocab_size=5))
    count = 2000
    tokens = generate(model, [[1, 2]] * count, max_new_tokens=1, stop_ids=[], temperature=1.0, batch_size=500)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([[1, 2]])).logits[0, -1].softmax(-1)
    found = torch.bincount(torch.tensor(tokens).view(-1), minlength=5) / count
    assert (found - expected).abs().max() < 4 * (0.25 / count) ** 0.5  # four standard deviations


def test_a_reply_ends_where_the_context_does():
    model = random_model(qwen3_config(max_position_embeddings=12))
    replies = generate(model, [[1] * 10, [1] * 4], max_new_tokens=50, stop_ids=[])
    assert [len(reply) for reply in replies] == [2, 8]
    assert len(list(stream(model, [1] * 10, max_new_tokens=50, stop_ids=[]))) == 2


def test_prompts_that_cannot_be_continued_are_refused():
    model = random_model(qwen3_config(max_position_embeddings=12))
    with pytest.raises(ModelError, match=r"prompt-empty\]: prompt 1 has no tokens(.|\n)*at least one token"):
        generate(model, [[1], []], max_new_tokens=2, stop_ids=[])
    with pytest.raises(
        ModelError, match=r"prompt-too-long\]: prompt 0 has 12 tokens; the model's context is 12(.|\n)*shorten"
    ):
        generate(model, [[1] * 12], max_new_tokens=2, stop_ids=[])


def test_no_prompts_give_no_replies():
    assert generate(random_model(qwen3_config()), [], max_new_tokens=2, stop_ids=[]) == []


def test_zero_new_tokens_give_empty_replies():
    assert generate(random_model(qwen3_config()), prompts(2), max_new_tokens=0, stop_ids=[]) == [[], []]


def test_adapted_models_answer_with_and_without_their_adapter():
    model = random_model(qwen3_config())
    before = generate(model, prompts(), max_new_tokens=9, stop_ids=[])
    adapted = attach_adapter(model, rank=4, dropout=0.3).train()
    randomize_adapter(adapted, scale=0.3)
    after = generate(adapted, prompts(), max_new_tokens=9, stop_ids=[])
    assert after != before
    with adapter_disabled(adapted):
        assert generate(adapted, prompts(), max_new_tokens=9, stop_ids=[]) == before
    assert adapted.training


def test_sixteen_bit_models_with_float32_adapters_generate():
    adapted = attach_adapter(random_model(qwen3_config(), dtype=torch.bfloat16), rank=4)
    assert len(generate(adapted, prompts(), max_new_tokens=3, stop_ids=[])[0]) == 3
