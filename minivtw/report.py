"""One page about one answer, to open with a double click: python -m minivtw.report IMAGE PROMPT -o report.html"""

from . import load
from .cli.options import Parser, add_method_options, add_model_option, check_question
from .cli.terminal import command, one_line
from .inputs.writing import check_writable, write_whole
from .page.story import report_html, story_of


def main(arguments: list[str]) -> None:
    options = Parser(prog="minivtw.report", description="One page that shows where the image leaves, and why it can.")
    add = options.add_argument
    add("image", metavar="IMAGE", help="an image in any format that Pillow reads")
    add("prompt", metavar="PROMPT", help="the question")
    add("-o", "--output", default="report.html", metavar="FILE", help="the page (default: report.html)")
    add("--horizon", action="store_true", help="also draw what each patch is still worth at each layer (slow)")
    add_model_option(options)
    add_method_options(options)
    chosen = options.parse_args(arguments)
    check_question(chosen.image, chosen.prompt)
    output = check_writable(chosen.output)
    vlm = load(chosen.model)
    method = vlm.method(chosen.withdraw, chosen.method)
    html = report_html(story_of(vlm, chosen.image, chosen.prompt, method, chosen.horizon))
    write_whole(output, html)
    print(f"{one_line(output)}: {len(html) / 1000:.0f} kB")


if __name__ == "__main__":
    command(main)
