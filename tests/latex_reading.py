"""What would break the compilation of a .tex file, found by reading, for machines without a LaTeX engine."""

import re

from moe_routing.studies.week import settable

COMMANDS = set(
    "begin end caption label centering footnotesize scriptsize small setlength tabcolsep toprule midrule "
    "bottomrule textbf texttt emph textsuperscript par raggedright arraybackslash input documentclass "
    "usepackage textbackslash textasciitilde textasciicircum multicolumn pm times geq leq Delta section "
    "subsection paragraph item maketitle title author date cite bibliography bibliographystyle "
    "includegraphics linewidth textwidth textheight allowbreak twocolumn icmltitle icmltitlerunning url "
    "href sloppy operatorname sum mathrm bar ".split()
)
NAMES = r"\\(?:label|input|cite|begin|end|includegraphics|usepackage|documentclass|bibliography|bibliographystyle|url)"
TOKEN = re.compile(r"\\\\|\\[{}]|\\begin\{[^}]*\}|\\end\{[^}]*\}|[{}]")


def check_latex(text: str) -> list[str]:
    "What would break its compilation, one line each; empty when nothing was found."
    blank = lambda m: "\n" * m[0].count("\n")
    text = re.sub(r"(?s)\\begin\{verbatim\}.*?\\end\{verbatim\}", blank, text)
    text = re.sub(r"(?<!\\)%.*", "", text)
    faults = [f"line {i}: {f}" for i, line in enumerate(text.split("\n"), 1) for f in line_faults(line)]
    return faults + nesting_faults(text) + table_faults(text)


def line_faults(line: str) -> list[str]:
    found = [f"unknown command \\{c}" for c in re.findall(r"\\([a-zA-Z]+)", line) if c not in COMMANDS]
    line = re.sub(NAMES + r"(\[[^\]]*\])?\{[^{}]*\}(\{[^}]*\})*", "", line)
    found += [f"character U+{ord(c):04X}" for c in line if not settable(c) and c != "\t"]
    line = re.sub(r"\\[\\$]|(?<!\\)\$[^$]*(?<!\\)\$", "", line)
    found += ["$ without its partner"] * ("$" in line)
    return found + [f"unescaped {c}" for c in re.findall(r"(?<!\\)[#_^]", line)]


def nesting_faults(text: str) -> list[str]:
    found, stack = [], []
    for token in TOKEN.findall(text):
        name = "{" if token in "{}" else token[token.find("{") + 1 : -1]
        if token.startswith("\\begin") or token == "{":
            stack.append(name)
        elif token.startswith("\\end") or token == "}":
            if not stack or stack[-1] != name:
                found.append(f"{token} without {{" if token == "}" else f"{token} closes {(stack or ['nothing'])[-1]}")
            else:
                stack.pop()
    return found + [f"{name} is not closed" for name in stack]


def table_faults(text: str) -> list[str]:
    found = []
    outside = re.sub(r"(?s)\\begin\{tabular\}.*?\\end\{tabular\}", "", text)
    if re.search(r"(?<!\\)&", outside):
        found.append("unescaped & outside a table")
    pattern = r"(?s)\\begin\{tabular\}\{((?:[^{}]|\{[^{}]*\})*)\}(.*?)\\end\{tabular\}"
    for columns, body in re.findall(pattern, text):
        wanted = len(re.findall("[lcrp]", re.sub(r"[@!><]?\{[^{}]*\}", "", columns)))
        *rows, rest = re.sub(r"\\(top|mid|bottom)rule", "", body).split(r"\\")
        for row in rows:
            spans = sum(int(n) - 1 for n in re.findall(r"\\multicolumn\{(\d+)\}", row))
            if (n := len(re.findall(r"(?<!\\)&", row)) + 1 + spans) != wanted:
                found.append(f"a row has {n} columns, the table {wanted}")
        if rest.strip():
            found.append("the last row does not end with \\\\")
    return found
