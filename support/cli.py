"""A Config dataclass from flags and YAML; errors that the user can fix are one line, with exit status 2."""

import argparse
import errno
import locale
import os
import re
import sys
from dataclasses import fields, is_dataclass
from itertools import pairwise
from pathlib import Path

import jsonargparse
import yaml
from torch import distributed

from support.checks import declared, listed
from support.devices import lacking_on_mps, out_of_memory
from support.errors import FOR_THE_USER
from support.files import reason
from support.launch import join
from support.nodes import first_on_node, tell_others, why_it_broke
from support.output import FULL_DISK, lose_output, prepare_output, run_demo

# What is wrong with a path, not with the program: permissions, a file for a folder or the reverse, links in a circle.
OUT_OF_REACH = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)


class _Parser(jsonargparse.ArgumentParser):
    def error(self, message, ex=None):
        """Print one line instead of the usage: what is wrong, and how to list the flags."""
        text = " ".join(str(message).split())
        choice = re.fullmatch(r'Parser key "(.+?)": Expected a typing\.Literal\[(.*)\]\. Got value: (.*)', text)
        if choice:  # in the words of checks.check
            choices = listed(re.findall("'(.*?)'", choice[2]))
            text = f"--{choice[1]} {choice[3]!r} is not known; use {choices}"
        if first_on_node():
            print(f"{self.prog}: error: {text} (see {self.prog} --help)", file=sys.stderr)
        tell_others(text)
        sys.exit(2)

    def parse_path(self, path, *args, **kwargs):
        """Read a --config file as UTF-8: jsonargparse would take the encoding of the locale. Of a key that stands twice
        YAML would take the last: it is refused."""
        try:
            text = Path(path).read_text(encoding="utf-8") if Path(path).is_file() else ""
        except UnicodeDecodeError as error:
            self.error(f"--config {path} is not UTF-8 text: {error}")
        if key := key_twice(text):
            self.error(f"--config {path}: the key {key!r} stands twice; leave one of them out")
        if not text or locale.getpreferredencoding(False).lower() in ("utf-8", "utf8"):
            return super().parse_path(path, *args, **kwargs)
        return self.parse_string(text, os.path.basename(path), *args, **kwargs)


def key_twice(text):
    """A key that stands twice in one mapping of a YAML text; None if there is none, or if it is no YAML."""
    try:
        nodes = [yaml.compose(text, Loader=yaml.SafeLoader)]
    except (yaml.YAMLError, RecursionError):  # the parser says what is wrong with it
        return None
    for node in nodes:  # grows by what mappings and lists hold; an alias may hold itself
        inner = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            keys, inner = [key.value for key, _ in node.value], [value for _, value in node.value]
            if twice := [key for key in keys if keys.count(key) > 1]:
                return twice[0]
        nodes += [new for new in inner if not any(new is known for known in nodes)]
    return None


class Demo(argparse.Action):
    """--demo: run the chapter's worked example and exit, as --help does."""

    def __init__(self, option_strings, dest, demo, help=None):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)
        self.demo = demo

    def __call__(self, parser, namespace, values, option_string=None):
        self.demo()
        parser.exit()


def parse_config(cls, args=None, description=None, demo=None):
    """A Config dataclass from flags and YAML: `--steps 500 --config FILE.yaml --model.n_layer 6`. The docstrings of the
    fields of `cls` are the help; `--print_config` prints all settings as YAML; `--demo` calls `demo`."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = _Parser(description=(description or cls.__doc__ or "").strip().split("\n\n")[0])
    parser.add_argument("--config", action="config", help="YAML file of settings; the flags after it override it")
    if demo:
        parser.add_argument(
            "--demo", action=Demo, demo=demo, help="print a small example worked by hand, in seconds, and exit"
        )
    parser.add_class_arguments(cls)
    words = sys.argv[1:] if args is None else list(args)
    for arg in words:
        value = arg.partition("=")[2] if arg.startswith("--") else arg
        if re.search("[\udc80-\udcff]", value) and not os.path.exists(value):  # bytes that Python could not decode
            encoding = sys.getfilesystemencoding()
            parser.error(f"{arg} is not {encoding} text, the encoding of this locale; a UTF-8 locale, or PYTHONUTF8=1")
    parsed = parser.parse_args(args)
    for f in fields(cls):
        if is_dataclass(declared(cls)[f.name]) and parsed.get(f.name) is None:
            parser.error(f"{f.name} is empty in the --config file: give it settings, or leave the line out")
    settings = parser.instantiate(parsed)
    values = {f.name: getattr(settings, f.name) for f in fields(cls)}
    for word, text in pairwise([*words, ""]):  # --prompt "# a heading": for YAML a comment, and so nothing
        flag, equals, value = word.partition("=")
        name, text = flag.removeprefix("--"), value if equals else text
        if declared(cls).get(name) == str | None and values[name] is None and text.lstrip().startswith("#"):
            values[name] = text
    return cls(**values)


def fail(problem):
    """Print the line of an error, once per node, and let the processes of other nodes know."""
    if first_on_node():
        print(f"error: {problem}", file=sys.stderr, flush=True)
    tell_others(problem)


def run_script(main, cls, description=None, demo=None, parse=None, without_flags=None):
    """The entry point of every script: main(config from the flags). Errors that the user can fix are printed as one
    line, with exit status 2. demo: the chapter's worked example, which --demo runs instead of main. parse() -> config,
    instead of `parse_config` on `cls`. without_flags: for a main that needs flags: without any, the example runs, and
    then this line is printed."""

    def example():
        demo()
        print(f"\n{without_flags}")

    if without_flags and len(sys.argv) == 1:
        run_demo(example)
        return
    prepare_output()
    try:
        main(parse() if parse else join(parse_config(cls, description=description, demo=demo)))
        sys.stdout.flush()
        status = 0
    except FOR_THE_USER as error:
        fail(error)
        status = 2
    except RuntimeError as error:
        if (line := lacking_on_mps(error) or out_of_memory(error) or why_it_broke(error)) is None:
            raise
        fail(line)
        status = 2
    except BrokenPipeError:  # python ablate.py | head
        lose_output()
        status = 141  # what a shell reports of a program that SIGPIPE has ended
    except OSError as error:
        if error.errno in FULL_DISK:
            lose_output()
            fail(f"{error.filename or 'the output'} cannot be written: {reason(error)}")
        elif error.errno in OUT_OF_REACH and error.filename:
            fail(f"{error.filename}: {reason(error)}")
        else:
            raise
        status = 2
    except KeyboardInterrupt:
        status = 130
    except SystemExit as stop:
        if not (isinstance(stop.code, int) and distributed.is_available() and distributed.is_initialized()):
            raise
        status = stop.code
    if distributed.is_available() and distributed.is_initialized():
        if status == 0:
            distributed.destroy_process_group()
        # DDP's threads are still alive (torch 2.13) and sometimes abort the interpreter at exit, so skip its shutdown.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if status:
        sys.exit(status)
