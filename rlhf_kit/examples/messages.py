"""What a cell says, as text or as chat messages, in our names for the roles; else it breaks a rule."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from rlhf_kit.columns import ROLES as PROMPT_ROLES
from rlhf_kit.data_files import short
from rlhf_kit.examples.book import Broken
from rlhf_kit.examples.rows import Prompt

__all__ = ["ROLES", "SPELLS_MESSAGES", "chat", "checked_text", "kept", "our_messages", "our_role", "talk"]

_HALF_CHARACTER = re.compile("[\ud800-\udfff]")
ROLES: Mapping[str, str] = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatbot": "assistant",
}  # fmt: skip
"""Roles as they are written in lower case, {"role", "content"} or {"from", "value"}, and ours."""
TOOLS = ("tool", "function", "function_call", "tool_call", "tool_response", "observation", "ipython")
"""Roles of messages to and from tools, which are not read."""
SPELLS_MESSAGES = r"^\s*\[\s*\{\s*\""
"""How a text begins that is a JSON list of objects."""


def checked_text(cell: Any, name: str, called: str) -> str:
    """Return a cell that is Unicode text with something in it; or raise Broken."""
    if not isinstance(cell, str):
        raise Broken("non-text cell", f"{called} must be text; seen {short(cell)}")
    if not cell.strip():
        raise Broken(f"empty {name}", f"{called} is empty")
    if _HALF_CHARACTER.search(cell):
        raise Broken("text that is not Unicode", f"{called} has half of a surrogate pair, which is not Unicode text")
    return cell


def our_role(written: Any, called: str, roles: Mapping[str, str]) -> str:
    """Return our name of a role, of those that are known and the card's own."""
    name = str(written).lower() if isinstance(written, str | int) else ""
    role = roles.get(name) or ROLES.get(name)
    if role is None and name in TOOLS:
        raise Broken("use of a tool", f"{called} is {written}; messages of tools are not read")
    if role is None:
        raise Broken(
            "unknown role",
            f"{called} must be system, user or assistant; seen {short(written)}"
            + f"; if it is one of them, write in the card roles: {{assistant: {short(written)}}}" * bool(name),
        )
    return role


def our_messages(cell: list[Any], called: str, roles: Mapping[str, str]) -> list[dict[str, str]]:
    """Return messages with our names; of what a message has beside role and content, use of tools is an error."""
    messages = []
    for message in cell:
        if not isinstance(message, dict):
            raise Broken("not a list of messages", f"{called} must be text or messages; seen {short(cell)}")
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if role is None:
            seen = short(", ".join(map(str, message)))
            raise Broken("unknown role", f"{called}: a message has role and content, or from and value; seen {seen}")
        role = our_role(role, f"{called}: the role of a message", roles)
        if calls := message.get("tool_calls") or message.get("function_call"):
            raise Broken("use of a tool", f"{called}: a message calls a tool, which is not read: {short(calls)}")
        if isinstance(content, list) and content and all(_is_text_part(part) for part in content):
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str) or _HALF_CHARACTER.search(content):
            raise Broken("non-text cell", f"{called}: the content of a message must be text; seen {short(content)}")
        messages.append({"role": role, "content": content})
    return messages


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def talk(cell: Any) -> Any:
    """Return the messages that a text spells as a JSON list, as cells of .csv files do; any other cell as it is."""
    if not isinstance(cell, str) or not re.match(SPELLS_MESSAGES, cell):
        return cell
    try:
        found = json.loads(cell)
    except (ValueError, RecursionError):
        return cell
    are_messages = all(
        isinstance(one, dict) and ({"role", "content"} <= one.keys() or {"from", "value"} <= one.keys())
        for one in found
    )
    return found if are_messages else cell


def chat(parts: Mapping[str, Any], called: str, roles: Mapping[str, str]) -> list[dict[str, str]]:
    """Return the messages of {system, history, user}; an empty system message or history is none."""
    messages: list[dict[str, str]] = []
    for role in PROMPT_ROLES:
        part = talk(parts.get(role)) if role == "history" else parts.get(role)
        if part in (None, "", []) and role != "user":
            continue
        if role != "history":
            messages += (
                [{"role": role, "content": checked_text(part, "prompt", f"{called}, {role}")}] if role in parts else []
            )
        elif isinstance(part, list) and all(isinstance(turn, list) and len(turn) == 2 for turn in part):
            for asked, answered in part:
                messages += [{"role": "user", "content": checked_text(asked, "prompt", f"{called}, history")}]
                messages += [{"role": "assistant", "content": checked_text(answered, "prompt", f"{called}, history")}]
        elif isinstance(part, list):
            messages += our_messages(part, f"{called}, history", roles)
        else:
            raise Broken("not a list of messages", f"{called}: history is a list of turns; seen {short(part)}")
    return messages


def kept(prompt: Prompt) -> Prompt:
    """Return the prompt if there is something to answer in it, or raise Broken."""
    if isinstance(prompt, str):
        if not prompt.strip():
            raise Broken("empty prompt")
    elif not prompt or not prompt[-1]["content"].strip():
        raise Broken("empty prompt")
    elif prompt[-1]["role"] == "assistant":
        raise Broken(
            "prompt ends with an answer", "the prompt ends with a message of the assistant, with nothing to answer"
        )
    return prompt
