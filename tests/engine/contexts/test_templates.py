"""Options of chat templates: what a conversation of contexts reads is what the template prints with them."""

from __future__ import annotations

import pytest
import torch
from conftest import make_variator

from llm_variator import CompressedContext, VariatorConfig, VariatorError
from llm_variator.sources.models import byte_tokenizer

CONFIG = VariatorConfig(k=2, sites=("ffn", "kv"), r=5, dense_head=1, dense_tail=2)
GREEDY = dict(max_new_tokens=4, do_sample=False)
TEMPLATE = (
    "{% if tools %}[{% for tool in tools %}{{ tool.function.name }};{% endfor %}]{% endif %}"
    "{% if documents %}({{ documents[0].text }}){% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if enable_thinking is defined and not enable_thinking %}<think/>"
    "{% endif %}{% endif %}"
)
SYSTEM, ASKED = [{"role": "system", "content": "A document."}], [{"role": "user", "content": "Why?"}]


def weather(city: str) -> str:
    """
    Says what the weather is.

    Args:
        city: where
    """
    return city


SCHEMA = {
    "type": "function",
    "function": {"name": "clock", "description": "Tells the time.", "parameters": {}},
}


@pytest.fixture
def tokenizer():
    made = byte_tokenizer()
    made.chat_template = TEMPLATE
    return made


@pytest.fixture
def model():
    return make_variator("llama", CONFIG, vocab_size=259)


OPTIONS = {
    "no thinking": dict(enable_thinking=False),
    "thinking": dict(enable_thinking=True),
    "tools": dict(tools=[weather, SCHEMA]),
    "documents": dict(documents=[{"title": "a", "text": "b"}]),
    "several": dict(tools=[SCHEMA], enable_thinking=False, documents=[{"text": "b"}]),
    "another template": dict(chat_template="{% for m in messages %}{{ m.content }}|{% endfor %}"),
}


@pytest.mark.parametrize("options", OPTIONS)
def test_a_conversation_reads_what_the_template_prints(model, tokenizer, options, tmp_path):
    """From memory and from a file, without repeating the options."""
    given = OPTIONS[options]
    context = model.compress(SYSTEM, tokenizer=tokenizer, chat_template_kwargs=given)
    printed = tokenizer.apply_chat_template(SYSTEM, tokenize=False, **given)
    assert tokenizer.decode(context.input_ids[0]) == printed
    whole = tokenizer.apply_chat_template(
        [*SYSTEM, *ASKED], tokenize=False, add_generation_prompt=True, **given
    )
    context.save(tmp_path / "context.safetensors")
    again = CompressedContext.load(tmp_path / "context.safetensors", model, tokenizer=tokenizer)
    plain = model.compress(tokenizer(printed, add_special_tokens=False, return_tensors="pt"))
    rest = tokenizer(whole.removeprefix(printed), add_special_tokens=False, return_tensors="pt")
    expected = model.generate(**rest, context=plain, **GREEDY)
    for one in (context, again, context.fork()):
        answer, after = model.generate(ASKED, context=one, return_context=True, **GREEDY)
        assert torch.equal(answer, expected)
        said = after.messages[0][-1]
        third = [*SYSTEM, *ASKED, said, *ASKED]
        whole_again = tokenizer.apply_chat_template(
            third, tokenize=False, add_generation_prompt=True, **given
        )
        asked = model.generate(ASKED, context=after, **GREEDY)
        assert whole_again.endswith(tokenizer.decode(asked[0, :-4]))


def test_a_question_with_options_of_its_own(model, tokenizer):
    context = model.compress(SYSTEM, tokenizer=tokenizer, chat_template_kwargs=dict(enable_thinking=True))
    for given, end in ((None, "<assistant>"), (dict(enable_thinking=False), "<assistant><think/>")):
        out = model.generate(ASKED, context=context, chat_template_kwargs=given, **GREEDY)
        assert tokenizer.decode(out[0, :-4]) == f"<user>Why?</s>{end}"
    longer = context.extend(ASKED, chat_template_kwargs=dict(enable_thinking=False))
    assert longer.chat_template_kwargs == dict(enable_thinking=False)
    assert context.chat_template_kwargs == dict(enable_thinking=True)


def test_messages_after_a_text(model, tokenizer):
    context = model.compress("A document.", tokenizer=tokenizer)
    given = dict(tools=[SCHEMA])
    out = model.generate(ASKED, context=context, chat_template_kwargs=given, **GREEDY)
    printed = tokenizer.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True, **given)
    assert tokenizer.decode(out[0, :-4]) == printed


@pytest.mark.parametrize("active", [True, False])
def test_messages_alone(model, tokenizer, active):
    """An answer follows, as after a context."""
    with model.use_plugin("default" if active else None):
        out = model.generate(ASKED, tokenizer=tokenizer, **GREEDY)
    assert tokenizer.decode(out[0, :-4]) == "<user>Why?</s><assistant>"


def test_calls_of_tools(model, tokenizer):
    """An assistant's message may hold calls in place of content."""
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content or m.tool_calls[0].name }}{% endfor %}"
    )
    said = [*ASKED, {"role": "assistant", "tool_calls": [{"name": "clock"}]}]
    context = model.compress(said, tokenizer=tokenizer)
    assert tokenizer.decode(context.input_ids[0]) == "<user>Why?<assistant>clock"
    answer = model.generate([{"role": "tool", "content": "noon"}], context=context, **GREEDY)
    assert tokenizer.decode(answer[0, :-4]) == "<tool>noon"
    with pytest.raises(VariatorError, match='needs "role" and "content"'):
        model.compress([{"role": "assistant"}], tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("what", "given", "message"),
    [
        ("text", dict(enable_thinking=False), "are for chat messages"),
        ([4, 5], dict(enable_thinking=False), "are for chat messages"),
        (SYSTEM, dict(add_generation_prompt=True), "add_generation_prompt is no option of a chat template"),
        (SYSTEM, dict(continue_final_message=True), "continue_final_message is no option"),
        (SYSTEM, dict(tools=[lambda x: x]), "tools as schemas or documented functions"),
        (SYSTEM, dict(note=object()), "a dict of plain values"),
        (SYSTEM, ["enable_thinking"], "a dict of plain values"),
    ],
)
def test_what_is_refused_in_one_line(model, tokenizer, what, given, message):
    with pytest.raises(VariatorError, match=message) as caught:
        model.compress(what, tokenizer=tokenizer, chat_template_kwargs=given)
    assert "\n" not in str(caught.value)


def test_options_without_a_context_are_refused(model):
    with pytest.raises(VariatorError, match="chat_template_kwargs needs a context"):
        model.generate([4, 5], chat_template_kwargs=dict(enable_thinking=False))
    context = model.compress([4, 5])
    with pytest.raises(VariatorError, match="are for chat messages"):
        model.generate([4, 5], context=context, chat_template_kwargs=dict(enable_thinking=False))


def test_tools_that_changed_are_noticed(model, tokenizer):
    """They stand in front of the context: another set of them would make it another context."""
    context = model.compress(SYSTEM, tokenizer=tokenizer, chat_template_kwargs=dict(tools=[SCHEMA]))
    with pytest.raises(VariatorError, match="does not print the context's messages as the beginning"):
        model.generate(ASKED, context=context, chat_template_kwargs=dict(tools=[weather]), **GREEDY)
