"""Tools of a run: found by name or as module:name, and asked so that whatever they do becomes a reply.

A tool is an object like agent.Tool: a name, a pattern, a function from text to text, and a time limit in seconds.
"""

import contextlib
import importlib
import inspect
import os
import re
import sys
import threading
from pathlib import Path

from support.errors import ConfigError

END = ">>"  # of a tool's reply
LONGEST_REPLY = 1000  # characters; a longer one is cut


def ask(tool, argument):
    """The tool's reply, one line of text. An exception, a reply that is no text, or none within the tool's time limit
    gives a reply too, one that begins with "error"."""
    replies = []

    def work():
        try:
            reply = tool.function(argument)
            replies.append(reply if isinstance(reply, str) else f"error: {type(reply).__name__} instead of text")
        except (Exception, SystemExit) as error:  # any error of the user's function
            replies.append(f"error: {type(error).__name__}")

    if tool.seconds is None:
        work()
    else:
        thread = threading.Thread(target=work, daemon=True)  # it cannot be killed; a daemon does not outlive the run
        thread.start()
        thread.join(tool.seconds)
    reply = replies[0] if replies else f"error: no answer within {tool.seconds:g} s"
    reply = reply[:LONGEST_REPLY].encode("utf-8", "replace").decode()  # half of a surrogate pair is no text
    return " ".join(reply.split())


def load_tools(names, built_in):
    """["calculator", "module:name"] -> tools. built_in: {name: tool}. A module is looked for beside the script and in
    the current directory. Raises ConfigError."""
    tools = []
    for name in names:
        module, colon, attribute = name.partition(":")
        if not colon:
            if name not in built_in:
                raise ConfigError(f"--tools {name}: not known; use {', '.join(built_in)}, or module:name of your own")
            tools.append(built_in[name])
            continue
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())  # permanently: the function may import modules when it is called
        try:
            tool = getattr(importlib.import_module(module), attribute)
            texts, fits = (tool.name, tool.pattern), callable(tool.function)
            fits = fits and isinstance(tool.seconds, (int, float, type(None)))
            fits = fits and (tool.seconds is None or 0 < tool.seconds <= threading.TIMEOUT_MAX)
            groups = re.compile(rf"(?:{tool.pattern})\Z").groups  # as agent.reply_to has it
        except re.error as error:
            what = f"pattern {tool.pattern!r}, which is put into a longer one: {error}; write flags as (?i:…)"
            raise ConfigError(f"--tools {name}: {what}") from None
        except (Exception, SystemExit) as error:  # any error of the user's module; a script that exits
            raise ConfigError(f"--tools {name}: {type(error).__name__}: {error}") from None
        if not fits or groups != 1 or not all(isinstance(text, str) for text in texts):
            needs = "a name, a pattern with one group, the argument, a function of it, and seconds above 0, or None"
            raise ConfigError(f"--tools {name}: needs {needs}")
        tools.append(tool)
    if len({tool.name for tool in tools}) < len(tools):
        raise ConfigError(f"--tools {', '.join(names)}: two tools have the same name")
    return tools


def code_of_tools(names, tools):
    """{what a message calls it: the bytes of its file} for each of the user's own tools whose file is known."""
    files = {}
    for name, tool in zip(names, tools, strict=True):
        with contextlib.suppress(OSError, TypeError):  # no file
            if ":" in name:
                files[f"the file of --tools {name}"] = Path(inspect.getsourcefile(tool.function)).read_bytes()
    return files


def turns(text, tools):
    """A solution with its calls -> [(text, whether it is the policy's), …]: the policy's, a tool's, the policy's, …
    "a <<3*4=12>>12" -> [("a <<3*4=", True), ("12>>", False), ("12", True)]."""
    patterns = [re.compile(rf"(?:{tool.pattern})([^<>]*{END})\Z") for tool in tools]  # apart: each may name its group
    parts, start = [], 0
    for end in re.finditer(END, text):  # reply by reply, as in a rollout: no call reaches over the reply to another
        calls = [call for pattern in patterns if (call := pattern.search(text, start, end.end()))]
        if calls:
            call = min(calls, key=re.Match.start)  # of the first tool whose pattern fits
            parts += [(text[start : call.start(2)], True), (call[2], False)]
            start = call.end()
    return [*parts, (text[start:], True)]
