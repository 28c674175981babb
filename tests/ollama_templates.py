"""Ollama's templates as Go's text/template renders them.

`python -m tests.ollama_templates` writes `data/ollama_templates.json`; it needs Go (1.19 was used). The tests only read
that file: a template that has changed since is one that Go has not rendered.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from amalgam.tools.export.llama_cpp.templates import STYLES, Style

DATA = Path(__file__).parent / "data" / "ollama_templates.json"
SYSTEM = {"role": "system", "content": "Answer {{ in }} rhymes."}
USER, ANSWER = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi\nthere"}
CONVERSATIONS: dict[str, list[dict[str, str]]] = {
    "a question": [USER],
    "a system message": [SYSTEM, USER],
    "an answer": [USER, ANSWER, {"role": "user", "content": 'And "you"?'}],
    "both": [SYSTEM, USER, ANSWER, USER, ANSWER, USER],
}
_PROGRAM = """package main

import (
	"bytes"
	"encoding/json"
	"os"
	"text/template"
)

type message struct{ Role, Content string }
type job struct {
	Template, System string
	Messages         []message
}

func main() {
	var jobs []job
	if err := json.NewDecoder(os.Stdin).Decode(&jobs); err != nil {
		panic(err)
	}
	var results []string
	for _, each := range jobs {
		var out bytes.Buffer
		parsed := template.Must(template.New("").Option("missingkey=zero").Parse(each.Template))
		if err := parsed.Execute(&out, each); err != nil {
			panic(err)
		}
		results = append(results, out.String())
	}
	json.NewEncoder(os.Stdout).Encode(results)
}
"""


def texts(style: Style) -> list[str]:
    """What the style itself makes of the conversations."""
    return [style.render(messages) for messages in CONVERSATIONS.values()]


def _job(style: Style, messages: list[dict[str, str]]) -> dict[str, Any]:
    system = [message["content"] for message in messages if message["role"] == "system"]
    return {"Template": style.go(), "System": "".join(system), "Messages": messages}


def main() -> None:
    """Ask Go."""
    jobs = [_job(style, messages) for style in STYLES for messages in CONVERSATIONS.values()]
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "render.go"
        program.write_text(_PROGRAM)
        run = subprocess.run(["go", "run", program], input=json.dumps(jobs), capture_output=True, text=True, check=True)
    rendered = iter(json.loads(run.stdout))
    found = {style.name: {"go": style.go(), "texts": [next(rendered) for _ in CONVERSATIONS]} for style in STYLES}
    DATA.write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
