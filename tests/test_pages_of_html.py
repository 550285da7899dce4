"""Of a page of HTML all the prose is read that it is about, whatever its tags, and nothing that stands around it."""

from __future__ import annotations

from random import Random

import pytest

pytest.importorskip("trafilatura")

from pretrain.core.foreign.documents import blocks, html

SENTENCES = [
    f"El administrador número {n} revisa con calma los registros del sistema antes de tomar cualquier decisión sobre él."
    for n in range(40)
]
MENU = (
    '<div id="banner"><a href="x">Descargar el libro</a></div><ul class="docnav"><li><a href="a">Anterior</a></li>'
    '<li>El manual entero</li><li><a href="b">Siguiente</a></li></ul>'
)
AROUND = {
    "menu": '<nav><ul><li><a href="/">Portada</a></li><li><a href="/d">Deportes del día</a></li></ul></nav>',
    "cookies": '<div class="cookie-banner"><p>Usamos galletas propias y ajenas para que la visita sea mejor, y puede '
    "aceptarlas todas o elegir cuáles quiere en cada momento.</p><button>Aceptar todo</button></div>",
    "related": '<div class="links"><h3>Lea también</h3><ul>'
    + "".join(f'<li><a href="/{n}">Una noticia muy distinta de la de hoy, número {n}</a></li>' for n in range(6))
    + "</ul></div>",
    "sidebar": "<aside><p>Suscríbase al boletín semanal para recibir lo mejor de cada semana en su correo, sin coste "
    "ninguno y cuando quiera.</p></aside>",
    "footer": "<footer><p>Todos los derechos reservados por la casa editorial de este diario, que no se hace responsable "
    "de lo que otros escriben.</p></footer>",
    "share": '<div class="share-buttons"><span>Compartir en las redes</span></div>',
}


def manual() -> str:
    """A page as DocBook's tools write them."""
    paragraphs = "".join(
        f'<div class="para">{text} Se llama con <code class="command">orden-{n}</code> y después <em>siempre</em> acaba '
        f"en el paso {n}.</div>"
        for n, text in enumerate(SENTENCES[:8])
    )
    note = f'<div class="sidebar"><p class="title">Nota al margen</p><div class="para">{SENTENCES[20]}</div></div>'
    rest = (
        "<dl><dt>vigilante</dt><dd>Quien mira lo que pasa.</dd><dt>portero</dt><dd>Quien abre la puerta.</dd></dl>"
        "<ul><li>primer paso breve</li><li>segundo paso breve</li></ul>"
        "<pre class='screen'># apt update\n    # apt install vigilante</pre>"
        "<table><tr><td>puerto</td><td>ochenta</td></tr></table>"
    )
    section = f'<div id="related-bugs-of-menus"><h3>Errores</h3><p>{SENTENCES[21]}</p><p>{SENTENCES[22]}</p></div>'
    return f"<html><body>{MENU}<div class='section'><h2>Vigilar</h2>{paragraphs}{note}{rest}{section}</div>{MENU}</body></html>"


def article(*around: str, inside: str = "") -> str:
    """A page as newspapers write them."""
    prose = "".join(f"<p>{text}</p>" for text in SENTENCES[:10])
    return f"<html><body>{''.join(around)}<article><h1>Un día largo</h1>{prose}{inside}</article></body></html>"


def test_of_a_manual_paragraphs_in_divs_notes_lists_definitions_code_and_tables_are_read():
    page = html.main_text(manual())
    lines = page.text.splitlines()
    for n, text in enumerate(SENTENCES[:8]):
        assert f"{text} Se llama con orden-{n} y después siempre acaba en el paso {n}." in lines
    for part in ("vigilante", "Quien mira lo que pasa.", "- segundo paso breve", "puerto | ochenta", *SENTENCES[20:23]):
        assert part in lines
    assert "# apt update\n    # apt install vigilante" in page.text
    assert "Anterior" not in page.text and "Descargar" not in page.text and "manual entero" not in page.text
    assert 0.9 * page.letters < page.taken < page.letters


@pytest.mark.parametrize("kind", AROUND)
@pytest.mark.parametrize("place", ["before", "inside"])
def test_of_an_article_what_stands_around_it_is_left_out(kind, place):
    piece = AROUND[kind]
    page = html.main_text(article(piece) if place == "before" else article(inside=piece))
    assert all(text in page.text for text in SENTENCES[:10])
    assert page.text.count("\n") <= 11 and page.taken < page.letters
    words = blocks.letters_of(blocks.body_of(html.parsed(f"<html><body>{piece}</body></html>"))[2][-1].text)
    assert words and words not in blocks.letters_of(page.text)


def test_what_is_written_in_scripts_alone_counts_for_no_text():
    page = html.main_text("<html><body><script>let a = 1</script><style>p {}</style></body></html>")
    assert page == ("", 0, 0)


def test_texts_in_elements_hundreds_deep_are_read():
    deep = f"{'<div>' * 200}<p>{SENTENCES[0]}</p>{'</div>' * 200}"
    assert SENTENCES[0] in html.main_text(f"<html><body>{deep}</body></html>").text


def test_blocks_are_parted_where_a_browser_parts_them_and_words_are_not():
    tree = html.parsed(
        "<html><body>one <b>t</b>wo<p>three<br>four</p>five<!-- no --> six<pre>a\n  b</pre>end</body></html>"
    )
    elements, parents, found = blocks.body_of(tree)
    assert [block.text for block in found] == ["one two", "three", "four", "five six", "a\n  b", "end"]
    assert len(elements) == len(parents) and parents[0] == -1 and all(0 <= p < n for n, p in enumerate(parents) if n)


def taken_of(page: str, text: str) -> str:
    """What is taken of a page of which that text was found."""
    elements, parents, pieces = blocks.body_of(html.parsed(page))
    taken = blocks.chosen(elements, parents, pieces, text)
    return text if taken is None else blocks.written(elements, pieces, taken)


def test_a_manual_of_whose_paragraphs_pieces_were_found_is_read_whole():
    pieces = [f"decisión sobre él. Se llama con en el paso {n}." for n in range(8)]  # what stood between is gone
    text = taken_of(manual(), "\n".join([*pieces, "# apt update\n # apt install vigilante"]))
    assert all(sentence in text for sentence in SENTENCES[:8]) and "en el paso 7." in text and "Descargar" not in text


def test_of_sections_of_which_one_was_found_all_are_read_but_for_what_stands_around():
    rng = Random(0)
    prose = [" ".join("".join(rng.choices("aeioulmnrst", k=7)) for _ in range(15)) + "." for _ in range(12)]
    sections = "".join(
        f"<div><h2>Parte {n}</h2><p>{prose[2 * n]}</p><p>{prose[2 * n + 1]}</p><ul><li>breve {n}</li></ul></div>"
        for n in range(6)
    )
    page = f"<html><body>{MENU}<div><div>{sections}</div></div>{AROUND['footer']}{MENU}</body></html>"
    text = taken_of(page, f"{prose[6]}\n{prose[7]}")
    assert all(sentence in text for sentence in prose) and "- breve 5" in text
    assert "Descargar" not in text and "derechos reservados" not in text
    news = (
        "Quien quiera saber más de otras cosas que pasaron ayer puede leer aquí todo aquello que hoy nos han contado."
    )
    links = "".join(f"<div><p><a href='{n}'>{news}</a></p></div>" for n in range(6))
    page = f"<html><body><div>{sections}</div><div>{links}</div></body></html>"
    assert news not in (text := taken_of(page, "\n".join(prose[:10]))) and prose[11] in text


def test_what_stands_in_a_line_of_a_page_is_no_line_of_its_own():
    page = f"<html><body><div><div>Una línea con <span>partes</span> dentro de ella. {SENTENCES[0]}</div></div></body></html>"
    assert taken_of(page, f"Una línea con\npartes\ndentro de ella. {SENTENCES[0]}").splitlines() == [
        f"Una línea con partes dentro de ella. {SENTENCES[0]}"
    ]
