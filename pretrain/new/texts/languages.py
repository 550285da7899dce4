"""Which language a text is in: of code by a file's ending, of prose by its commonest words. Enough for a comment."""

from __future__ import annotations

import re
from collections import Counter

CODE = {
    "Python": (".py", ".pyi"), "C": (".c", ".h"), "C++": (".cpp", ".cc", ".cxx", ".hpp", ".hh"), "Rust": (".rs",),
    "Go": (".go",), "Java": (".java",), "JavaScript": (".js", ".mjs", ".cjs", ".jsx"), "TypeScript": (".ts", ".tsx"),
    "C#": (".cs",), "Kotlin": (".kt", ".kts"), "Scala": (".scala",), "Swift": (".swift",), "Ruby": (".rb",),
    "PHP": (".php",), "Perl": (".pl", ".pm"), "Lua": (".lua",), "R": (".r",), "Julia": (".jl",),
    "shell": (".sh", ".bash"),
    "SQL": (".sql",), "Haskell": (".hs",), "OCaml": (".ml", ".mli"), "Elixir": (".ex", ".exs"), "Erlang": (".erl",),
    "Clojure": (".clj",), "Dart": (".dart",), "Zig": (".zig",), "Fortran": (".f90", ".f"), "CUDA": (".cu", ".cuh"),
    "CSS": (".css", ".scss"), "Vue": (".vue",), "Lisp": (".lisp", ".el", ".scm"), "Verilog": (".v", ".sv"),
    "Cython": (".pyx", ".pxd", ".pxi"), "Objective-C": (".m", ".mm"), "Svelte": (".svelte",), "Nim": (".nim",),
    "PowerShell": (".ps1", ".psm1"), "F#": (".fs", ".fsx"), "Groovy": (".groovy", ".gradle"), "D": (".d",),
    "Solidity": (".sol",), "assembly": (".s", ".asm"), "Protobuf": (".proto",), "GLSL": (".glsl", ".vert", ".frag"),
    "Tcl": (".tcl",), "Pascal": (".pas",), "Ada": (".adb", ".ads"), "Crystal": (".cr",), "VHDL": (".vhd", ".vhdl"),
    "CMake": (".cmake",), "HTML": (".html", ".htm", ".xhtml"),
    "templates": (".jinja", ".jinja2", ".j2", ".tmpl", ".mustache", ".hbs", ".erb", ".ejs"),
    "TeX style": (".sty", ".cls"), "Visual Basic": (".vb",), "Terraform": (".tf",),
}  # fmt: skip
MARKUP = (".html", ".htm", ".xhtml")
LANGUAGE_OF = {end: name for name, ends in CODE.items() for end in ends}
# A dozen of the commonest words of each language, those that it has alone or nearly so.
COMMON = {
    "English": "the and of to was that with for his he had is",
    "French": "le les des et dans une est que pour pas qui du",
    "German": "der die und das nicht ist mit ein den von sich auf",
    "Spanish": "el los las y que por una con para del su se",
    "Italian": "il di che la gli per non una della sono con del",
    "Portuguese": "o os que não uma para com do da em um as",
    "Dutch": "de het een van en niet dat zijn op te voor met",
    "Swedish": "och det att som en på är av inte den till jag",
    "Polish": "nie się na jest że do to jak w z i ale",
    "Russian": "и в не на что он с как это по но его",
    "Ukrainian": "і в не на що він з як це до але його",
    "Turkish": "ve bir bu da de için ne o ile gibi daha çok",
    "Czech": "je se na to že v a s z do jsem ale",
    "Finnish": "ja on ei että se oli hän mutta kun niin ovat myös",
    "Bulgarian": "и на не да се в за от с че е по",
    "Greek": "και το του της η να την που με για δεν στο",
}
# Single letters are names of options and variables as often as they are words.
WORDS = {name: {word for word in words.split() if len(word) > 1} for name, words in COMMON.items()}
SCRIPTS = {  # languages that are told by their letters
    "Chinese": "\u4e00-\u9fff", "Japanese": "\u3040-\u30ff", "Korean": "\uac00-\ud7af", "Arabic": "\u0600-\u06ff",
    "Hebrew": "\u0590-\u05ff", "Hindi": "\u0900-\u097f", "Thai": "\u0e00-\u0e7f",
}  # fmt: skip
LEAST = 0.08  # of the words must be common ones of a language


def prose_language(text: str) -> str | None:
    """The language of a text; None where it is too short, or none of those known here."""
    letters = sum(map(str.isalpha, text))
    for name, script in SCRIPTS.items():  # Japanese, which has Chinese letters too, has more of its own than not
        count = len(re.findall(f"[{script}]", text))
        if count > letters * (0.2 if name == "Japanese" else 0.5) and letters and not _japanese(name, text):
            return name
    words = Counter(re.findall(r"[^\W\d_]+", text.lower()))
    total = sum(words.values())
    shares = {name: sum(words[word] for word in common) / max(1, total) for name, common in WORDS.items()}
    best = max(shares, key=lambda name: shares[name])
    return best if total >= 5 and shares[best] >= LEAST else None


def _japanese(name: str, text: str) -> bool:
    return name == "Chinese" and re.search("[\u3040-\u30ff]", text) is not None
