"""`task.protocol=lmeval`, `piqa:lmeval-v1.0-0shot-w2048`: lm-evaluation-harness' own tasks, untouched.

The tasks are loaded in evaluate/lmeval.py and scored in evaluate/harness.py. Settings and local files are checked here,
before lm-eval, which takes seconds, is imported.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qbench.config import RuntimeConfig
from qbench.errors import RequestError
from qbench.evaluate import generation, hflm, lmeval, shots
from qbench.evaluate.harness import TaskEvaluation
from qbench.evaluate.lmeval import TaskSource
from qbench.evaluate.protocol import inside
from qbench.evaluate.text import TextSource, read_json_lines, read_text, wikitext_pages


@dataclass(frozen=True, kw_only=True)
class LmEval:
    name: str = "lmeval"  # of the configuration; the protocol is called by its tasks' names
    names: list[str] = field(default_factory=list)  # lm-eval's tasks or groups
    path: str | None = None  # documents in place of the data of a single task
    include_path: str | None = None  # folder with YAML of further lm-eval tasks
    limit: int | None = None  # documents of each task, from the start
    num_fewshot: int | None = None  # None: the task's own
    window: int = 2048  # lm-eval's max_length, in tokens
    add_bos_token: bool | None = None
    beyond_positions: bool = False
    apply_chat_template: bool = False  # questions in the tokenizer's chat template
    fewshot_as_multiturn: bool | None = None  # shots as turns of their own; None: with a chat template
    system_instruction: str | None = None  # before everything
    chat_template_args: dict[str, Any] | None = None  # variables of the template, such as enable_thinking
    gen_kwargs: dict[str, Any] | None = None  # of a task that generates, in place of its own
    samples: int = 1  # of each answer, where it is sampled
    seed: int = shots.SEED  # of the first sample; the others have those after it
    generate_batch: int = 8  # answers that are generated together

    @property
    def multiturn(self) -> bool:
        return self.apply_chat_template if self.fewshot_as_multiturn is None else self.fewshot_as_multiturn

    @property
    def prompting(self) -> dict[str, Any]:
        """How lm-eval is to put its questions, in its own words."""
        chat = {"apply_chat_template": self.apply_chat_template, "fewshot_as_multiturn": self.multiturn}
        return chat | {"system_instruction": self.system_instruction}

    def settings(self) -> dict[str, Any]:
        """Of how answers are asked for and generated, what was asked: the default of each is no setting."""
        found = {key: value for key, value in inside(self).items() if key != "name"}
        return {
            key: value for key, value in found.items() if key not in generation.KEYS or value != getattr(LmEval, key)
        }

    def check(self, runtime: RuntimeConfig) -> None:
        if self.window < 2:
            raise RequestError(f"task.window must be at least 2 tokens, got {self.window}")
        if not self.names:
            raise RequestError("task.names must name lm-eval tasks, such as task.names=[hellaswag,piqa]")
        if len(set(self.names)) < len(self.names):
            raise RequestError(f"task.names has a name twice: {', '.join(self.names)}")
        if self.limit is not None and self.limit < 1:
            raise RequestError(f"task.limit must be at least 1, or null for all documents, got {self.limit}")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise RequestError(
                f"task.num_fewshot must be at least 0, or null for the task's own, got {self.num_fewshot}"
            )
        if self.path is not None and len(self.names) > 1:
            raise RequestError(f"task.path holds the documents of one task, task.names has {len(self.names)}")
        generation.check(self)

    def read(self) -> TaskSource:
        """Reads the local files; the tasks' own data is lm-eval's to fetch."""
        digest = hashlib.sha256(version("lm_eval").encode())
        documents = None
        for file in lmeval.embedded(self.names):
            digest.update(file.read_bytes())
        if self.path is not None:
            documents = self._documents(Path(self.path).expanduser())
            digest.update(repr(documents).encode())
        if self.include_path is not None:
            folder = Path(self.include_path).expanduser()
            if not folder.is_dir():
                raise RequestError(f"task.include_path={folder} is not a folder; it holds the YAML of lm-eval tasks")
            kinds = (".yaml", ".py", ".json", ".jsonl")
            for file in sorted(file for file in folder.rglob("*") if file.suffix in kinds):
                digest.update(file.read_bytes())
        return TaskSource(self, documents, digest.hexdigest())

    def check_length(self, source: TaskSource) -> None:
        """A document may be of any length."""

    def prepare(self, source: TaskSource, tokenizer: Any, runtime: RuntimeConfig) -> TaskEvaluation:
        """Raises RequestError, with the closest names, when lm-eval cannot load a task as it is asked for."""
        hflm.check(tokenizer, self)
        tasks = lmeval.load(source)
        leaves = [leaf for loaded in tasks for leaf in loaded.leaves.values()]
        generation.check_room(leaves, self.window)
        if self.apply_chat_template:
            generation.check_template(tokenizer, self, leaves)
        return TaskEvaluation(tasks, tokenizer, self, runtime, source.sha256)

    def _documents(self, path: Path) -> list[dict[str, Any]]:
        if {".json", ".jsonl", ".parquet"} & set(path.suffixes):
            return read_json_lines(path)
        if self.names != ["wikitext"]:
            raise RequestError(
                f"task.path={path} must be .json or .jsonl (or .parquet), a line for each document of {self.names[0]}"
            )
        return [{"page": page} for page in wikitext_pages(read_text(TextSource(path=str(path)), self.name).content)]
