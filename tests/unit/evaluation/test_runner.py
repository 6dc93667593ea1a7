# SPDX-License-Identifier: Apache-2.0
import json
import re
from dataclasses import replace

import pytest
import torch

from nemo_rba.evaluation.judged import RewardTask
from nemo_rba.evaluation.runner import read_answers, rescore, run
from nemo_rba.evaluation.systems import CascadeSystem, PolicySystem, TeacherSystem
from nemo_rba.evaluation.tasks import InstructionFollowingTask
from nemo_rba.types import Instruction, Rollout, SamplingParams, SpeechBatch

PARAMS = SamplingParams(max_new_tokens=4, temperature=0.0)
WORDS = ["zero", "one", "two", "three", "four", "five"]


def make_batch(words: list[str], *, context: str = "") -> SpeechBatch:
    size = len(words)
    return SpeechBatch(
        instructions=tuple(
            Instruction(id=f"id-{word}", text=f"say {word}", response=word, task="say", context=context)
            for word in words
        ),
        audio=torch.zeros(size, 8),
        audio_lens=torch.full((size,), 8),
        prompt_ids=torch.zeros(size, 2, dtype=torch.int64),
        prompt_lens=torch.full((size,), 2),
        response_ids=torch.zeros(size, 1, dtype=torch.int64),
        response_lens=torch.ones(size, dtype=torch.int64),
    )


def make_task(words: list[str] = WORDS, *, context: str = "") -> InstructionFollowingTask:
    return InstructionFollowingTask(
        name="held-out voices",
        batches=lambda: (make_batch(words[i : i + 2], context=context) for i in range(0, len(words), 2)),
        verify=lambda text, response: float(response in text),
        kinds={},
    )


class FakeSystem:
    """Says the last word of the instruction; stops after ``patience`` batches."""

    name = "fake"

    def __init__(self, patience: int = 99, decoding: dict | None = None):
        self.patience = patience
        self.decoding = decoding or {"temperature": 0.0, "stop": ("a", "b")}
        self.asked = []

    def answer(self, batch: SpeechBatch) -> list[Rollout]:
        if self.patience == 0:
            raise KeyboardInterrupt
        self.patience -= 1
        self.asked += [item.id for item in batch.instructions]
        return [reply(row, item, item.text.split()[-1]) for row, item in enumerate(batch.instructions)][::-1]


def reply(row: int, item: Instruction, response: str) -> Rollout:
    ids = torch.tensor([1])
    return Rollout(prompt_index=row, instruction=item, response=response, token_ids=ids, logprobs=None, truncated=False)


def test_clips_are_read_once_for_all_who_have_answered_and_again_for_those_who_have_not(tmp_path):
    passes = []

    def task(name: str = "held-out voices") -> InstructionFollowingTask:
        made = make_task()
        made.name, read = name, made.batches
        made.batches = lambda: passes.append(name) or read()
        return made

    others = [FakeSystem(), FakeSystem(patience=2), FakeSystem()]
    for place, system in enumerate(others):
        system.name = f"fake {place}"
    first = run(others[0], task(), tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run(others[1], task(), tmp_path)
    whole = run(others[2], task(), tmp_path)
    passes.clear()
    walked = {}
    again = [run(others[0], task(), tmp_path, walked=walked)]
    others[1].patience = 99
    again += [run(system, task(), tmp_path, walked=walked) for system in (others[1], others[2])]
    assert passes == ["held-out voices"] * 2  # of the first, and of the one that had not finished
    assert again[0] == first
    assert again[2] == whole
    assert [p.response for p in again[1]] == WORDS
    assert others[1].asked == [f"id-{word}" for word in WORDS]
    run(others[0], task("another"), tmp_path, walked=walked)
    assert passes[-1] == "another"


def test_answers_kept_of_items_that_have_changed_are_refused_without_reading_clips_too(tmp_path):
    run(FakeSystem(), make_task(), tmp_path)
    walked = {"held-out voices": [replace(item, text="sing") for item in make_batch(WORDS).instructions]}
    with pytest.raises(ValueError, match="use a new output folder for a new manifest"):
        run(FakeSystem(), make_task(), tmp_path, walked=walked)


def test_run_writes_what_it_returns_in_the_tasks_order(tmp_path):
    predictions = run(FakeSystem(), make_task(), tmp_path)
    assert [p.response for p in predictions] == WORDS
    assert {(p.value, p.weight, p.family, p.kind) for p in predictions} == {(100.0, 1.0, "say", "")}
    lines = (tmp_path / "held-out voices" / "fake.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["decoding"]["temperature"] == 0.0
    assert [json.loads(line)["id"] for line in lines[1:]] == [f"id-{word}" for word in WORDS]


def test_a_judge_is_asked_for_a_whole_batch_at_once_also_for_answers_that_were_there(tmp_path):
    asked = []

    def judge(rollouts):
        asked.append([rollout.response for rollout in rollouts])
        return torch.tensor([0.25 * len(rollout.response) for rollout in rollouts])

    words = ["one", "four", "two"]
    batches = make_task(words).batches
    for _ in range(2):
        predictions = run(
            FakeSystem(), RewardTask(name="judged", batches=batches, reward=judge, prices=None, kinds={}), tmp_path
        )
        assert [p.value for p in predictions] == [75.0, 100.0, 75.0]
    assert asked == [["one", "four"], ["two"]] * 2


@pytest.mark.parametrize("cut", [0, 7, 10_000])
def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, cut):
    whole = run(FakeSystem(), make_task(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(FakeSystem(patience=2), make_task(), tmp_path / "cut")
    path = tmp_path / "cut" / "held-out voices" / "fake.jsonl"
    content = path.read_bytes()
    path.write_bytes(content[: max(len(content) - cut, 5)])  # killed in the middle of a line, or of the header
    system = FakeSystem()
    assert run(system, make_task(), tmp_path / "cut") == whole
    assert path.read_bytes() == (tmp_path / "whole" / "held-out voices" / "fake.jsonl").read_bytes()
    assert len(system.asked) == {0: 2, 7: 4, 10_000: 6}[cut]
    again = FakeSystem()
    assert run(again, make_task(), tmp_path / "cut") == whole
    assert again.asked == []


def test_kept_answers_are_scored_anew(tmp_path):
    run(FakeSystem(), make_task(), tmp_path)
    task = make_task()
    task.verify = lambda text, response: 0.25
    assert {p.value for p in run(FakeSystem(), task, tmp_path)} == {25.0}


def test_saved_answers_are_scored_as_a_run_would_score_them(tmp_path):
    run(FakeSystem(), make_task(), tmp_path)
    path = tmp_path / "held-out voices" / "fake.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]) + '{"system": "cut of')
    path.with_name("fake.rank-1.jsonl").write_text("".join([lines[0], *lines[3:]]))  # as two ranks leave them
    task = make_task()
    task.verify = lambda text, response: len(response) / 5
    again, system = run(FakeSystem(), task, tmp_path), FakeSystem()
    saved = read_answers(system.name, task.name, tmp_path)
    items = [item for batch in task.batches() for item in batch.instructions]
    assert rescore(saved, task, items) == again
    assert [prediction.value for prediction in again] == [100 * len(word) / 5 for word in WORDS]
    assert saved.decoding == {"temperature": 0.0, "stop": ["a", "b"]}
    assert read_answers("nobody", task.name, tmp_path).predictions == {}
    task.measure = "wer"
    assert {prediction.measure for prediction in rescore(saved, task, items)} == {"wer"}, "today's"
    with pytest.raises(ValueError, match="'id-zero' was 'say zero'"):
        rescore(saved, task, [replace(item, text="say nothing") for item in items])
    other = json.loads(lines[0]) | {"decoding": {"temperature": 1.0}}
    path.with_name("fake.rank-1.jsonl").write_text(json.dumps(other) + "\n")
    with pytest.raises(ValueError, match=r"rank-1.jsonl belongs to .*1\.0.* expected .*0\.0"):
        read_answers(system.name, task.name, tmp_path)


def test_answers_of_other_weights_or_to_other_sounds_are_not_taken_for_these(tmp_path):
    basis = {"weights": "abc", "typed": False, "augmentation": {"snr_db_min": 20.0}}
    whole = run(FakeSystem(), make_task(), tmp_path, basis)
    again = FakeSystem()
    assert run(again, make_task(), tmp_path, json.loads(json.dumps(basis))) == whole
    assert again.asked == []
    assert read_answers("fake", "held-out voices", tmp_path).basis == basis
    for change in ({"weights": "def"}, {"augmentation": {"snr_db_min": -20.0}}, {"typed": True}):
        key, value = next(iter(change.items()))
        with pytest.raises(ValueError, match=f"something else: basis {key} was .*, expected {re.escape(repr(value))}"):
            run(FakeSystem(), make_task(), tmp_path, basis | change)


def test_the_teacher_answers_the_same_words_once(tmp_path):
    asked = []

    class Teacher:
        def render(self, messages, *, open_turn):
            return messages[0]["content"]

        def generate(self, prompts, params):
            asked.extend(prompts)
            return [prompt.upper() for prompt in prompts]

    system = TeacherSystem(name="teacher", teacher=Teacher(), params=PARAMS)
    first, second = (run(system, make_task(), tmp_path / name) for name in ("heard", "noisy"))
    assert [p.response for p in first] == [p.response for p in second] == [f"SAY {word.upper()}" for word in WORDS]
    assert asked == [f"say {word}" for word in WORDS]


def test_what_does_not_belong_together_is_refused(tmp_path):
    run(FakeSystem(), make_task(), tmp_path)
    with pytest.raises(ValueError, match="new output folder, or delete"):
        run(FakeSystem(decoding={"temperature": 1.0}), make_task(), tmp_path)
    with pytest.raises(ValueError, match="'id-zero' was 'say zero'"):
        run(FakeSystem(), make_task(context="Now:"), tmp_path)
    with pytest.raises(ValueError, match="two items with id 'id-one'"):
        run(FakeSystem(), make_task(["one", "two", "one"]), tmp_path / "twice")
    odd = FakeSystem()
    odd.name = "../odd"
    with pytest.raises(ValueError, match="becomes a file name"):
        run(odd, make_task(), tmp_path)
    half = FakeSystem()
    half.answer = lambda batch: [reply(0, batch.instructions[0], "x")]
    with pytest.raises(ValueError, match=r"answered prompts \[0\], expected each of 0\.\.1 once"):
        run(half, make_task(), tmp_path / "half")


class FakePolicy:
    """Hears "two" as "too"; transcribes when the context asks for it."""

    def generate(self, batch, *, group_size, params):
        assert group_size == 1
        self.batch, self.params = batch, params
        heard = [item.text.replace("two", "too") for item in batch.instructions]
        return [reply(row, batch.instructions[row], text) for row, text in enumerate(heard)]


class FakeTeacher:
    def render(self, messages, *, open_turn):
        return f"{messages[0]['content']}|{open_turn}"

    def generate(self, prompts, params):
        self.prompts = prompts
        return [prompt.split("|")[0].split()[-1].replace("five", "") for prompt in prompts]


class FakeEncoder:
    pad_id = 9

    def encode_prompt(self, instruction):
        return [len(word) for word in f"{instruction.context} {instruction.id}".split()][
            : 1 + len(instruction.text) % 2
        ]


def test_teacher_system_reads_context_and_words(tmp_path):
    teacher = FakeTeacher()
    predictions = run(TeacherSystem(name="T", teacher=teacher, params=PARAMS), make_task(context="Now:"), tmp_path)
    assert teacher.prompts == ["Now: say four|assistant", "Now: say five|assistant"]
    assert [p.response for p in predictions] == [*WORDS[:-1], ""]
    assert [p.truncated for p in predictions] == [False] * 5 + [True]


def test_policy_system_passes_its_decoding_on(tmp_path):
    policy = FakePolicy()
    system = PolicySystem(name="S", policy=policy, params=PARAMS)
    assert [p.response for p in run(system, make_task(["one"]), tmp_path)] == ["say one"]
    assert policy.params == PARAMS
    assert system.decoding["max_new_tokens"] == 4


def test_cascade_answers_what_it_heard_and_keeps_it(tmp_path):
    policy, teacher = FakePolicy(), FakeTeacher()
    system = CascadeSystem(
        name="cascade",
        policy=policy,
        teacher=teacher,
        encoder=FakeEncoder(),
        transcribe_context="Transcribe:",
        transcribe_params=replace(PARAMS, max_new_tokens=9),
        params=PARAMS,
    )
    predictions = run(system, make_task(["one", "two", "three"], context="Now:"), tmp_path)
    assert [(p.text, p.heard, p.response) for p in predictions] == [
        ("say one", "say one", "one"),
        ("say two", "say too", "too"),
        ("say three", "say three", "three"),
    ]
    assert [p.value for p in predictions] == [100.0, 0.0, 100.0]
    assert teacher.prompts == ["Now: say three|assistant"]
    assert policy.params.max_new_tokens == 9
    assert {item.context for item in policy.batch.instructions} == {"Transcribe:"}
    assert policy.batch.prompt_ids.tolist() == [[11, 8]]
    assert policy.batch.prompt_lens.tolist() == [2]
