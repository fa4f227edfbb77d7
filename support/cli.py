"""A Config dataclass from flags and YAML; what the user can mend comes out as one line and exit status 2."""

import argparse
import os
import re
import sys
from dataclasses import fields

import jsonargparse
from torch import distributed

from support.checks import listed
from support.errors import CheckpointError, ConfigError, DataError, TokenizerError


class _Parser(jsonargparse.ArgumentParser):
    def error(self, message, ex=None):
        """One line, no usage dump: what is wrong, and where the flags are listed."""
        text = " ".join(str(message).split())
        choice = re.fullmatch(r'Parser key "(.+?)": Expected a typing\.Literal\[(.*)\]\. Got value: (.*)', text)
        if choice:  # as checks.check says it
            words = listed(re.findall("'(.*?)'", choice[2]))
            text = f"--{choice[1]} {choice[3]!r} is not known; use {words}"
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            print(f"{self.prog}: error: {text} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


class _Demo(argparse.Action):
    """--demo: run the chapter's worked example and leave, as --help does."""

    def __init__(self, option_strings, dest, demo, help=None):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)
        self.demo = demo

    def __call__(self, parser, namespace, values, option_string=None):
        self.demo()
        parser.exit()


def parse_config(cls, args=None, description=None, demo=None):
    """A Config dataclass from flags and YAML: `--steps 500 --config FILE.yaml --model.n_layer 6`. The attribute
    docstrings of `cls` are the help; `--print_config` writes the YAML of what would run, `--demo` calls `demo`."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = _Parser(description=(description or cls.__doc__ or "").strip().split("\n\n")[0])
    parser.add_argument("--config", action="config", help="YAML file of these settings; flags after it win")
    if demo:
        parser.add_argument(
            "--demo", action=_Demo, demo=demo, help="work the chapter's idea by hand, in seconds, and exit"
        )
    parser.add_class_arguments(cls)
    settings = parser.instantiate(parser.parse_args(args))
    return cls(**{f.name: getattr(settings, f.name) for f in fields(cls)})


def run_script(main, cls, description=None, demo=None):
    """Entry of every script: flags in, and what the user can mend comes out as one line and exit status 2.

    demo: the chapter's worked example, which --demo runs instead of main."""
    try:
        main(parse_config(cls, description=description, demo=demo))
        status = 0
    except (ConfigError, CheckpointError, TokenizerError, DataError) as error:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # a line for each node
            print(f"error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        status = 130
    if distributed.is_available() and distributed.is_initialized():
        if status == 0:
            distributed.destroy_process_group()
        # Where DDP was used its threads live on (torch 2.13), and now and then they abort the interpreter's end.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if status:
        sys.exit(status)
