import pytest

from r1 import chat

GOOD = "<think> 1 + 1 is 2 </think>\n<answer> 2 </answer>"


@pytest.mark.parametrize(
    "question",
    [
        "What is 1 + 1?",
        "100% of {x} and {question} and {0} and %s and $x and \\1",
        "Say <answer>7</answer> <think>",
        "na\u00efve \u6570\u5b66 \U0001f600",
        "",
    ],
)
@pytest.mark.parametrize("name", ["r1_zero", "compact"])
def test_render_puts_the_question_in_once(name, question):
    template = chat.load_template(name)
    before, after = template.split(chat.SLOT)
    prompt = chat.render(template, question)
    assert prompt == before + question + after
    assert prompt.endswith("Assistant:")
    parsed = chat.parse(GOOD)
    assert parsed == ("1 + 1 is 2", "2", True, "ok")


def test_r1_zero_names_each_tag():
    template = chat.load_template("r1_zero")
    assert all(tag in template for tag in chat.TAGS)


@pytest.mark.parametrize(
    "completion, reason",
    [
        ("", "no <think>"),
        ("2", "no <think>"),
        ("<think>a</think>", "no <answer>"),
        ("<think>a<answer>2</answer>", "no </think>"),
        ("<think>a</think><answer>2", "no </answer>"),
        ("<think>a<think>b</think></think><answer>2</answer>", "<think> occurs 2 times"),
        ("<think>a</think><answer>2</answer><answer>3</answer>", "<answer> occurs 2 times"),
        ("<answer>2</answer><think>a</think>", "tags out of order"),
        ("<think>a<answer>2</answer></think>", "tags out of order"),
        ("so <think>a</think><answer>2</answer>", "text outside"),
        ("<think>a</think> thus <answer>2</answer>", "text outside"),
        ("<think>a</think><answer>2</answer> User: next", "text outside"),
        ("<think> \n</think><answer>2</answer>", "empty <think>"),
        ("<think>a</think><answer> </answer>", "empty <answer>"),
    ],
)
def test_parse_refuses(completion, reason):
    parsed = chat.parse(completion)
    assert not parsed.ok
    assert reason in parsed.reason


def test_parse_accepts_white_space_and_line_breaks():
    assert chat.parse("\n <think>\na\n\nb\n</think> \n <answer>\n2\n</answer>\n").answer == "2"


def test_templates_from_files(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("Q: {question}\nA:\n")
    assert chat.render(chat.load_template(str(path)), "why") == "Q: why\nA:"
    path.write_text("no slot")
    with pytest.raises(ValueError, match="once, has it 0 times"):
        chat.load_template(str(path))
    with pytest.raises(ValueError, match="compact, r1_zero"):
        chat.load_template("r1_zer")
