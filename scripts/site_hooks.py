"""What the site of docs/ has beyond its pages: the commands, read off the command line, and links to other files."""

from __future__ import annotations

import re

import typer.main
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from typer.cli import get_docs_for_click

from pipeline.cli import app


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the page of commands."""
    command = typer.main.get_command(app)
    context = typer.Context(command, info_name="exsearch")
    text = get_docs_for_click(obj=command, ctx=context, name="exsearch", title="Commands")
    files.append(File.generated(config, "commands.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: object) -> str:
    """Links to files of the repository that are no pages go there, where its address is known; else the name alone
    stays."""
    to_the_root = page.file.src_uri.count("/") + 1
    outside = re.compile(rf"\[([^\]]*)\]\((?:\.\./){{{to_the_root}}}([^)#]*)\)")
    to = f"[\\1]({config.repo_url.rstrip('/')}/blob/main/\\2)" if config.repo_url else r"\1"
    return outside.sub(to, markdown)
