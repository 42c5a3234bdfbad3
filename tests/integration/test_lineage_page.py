"""The lineage page in a Chromium: drawn without an error, searched, walked by keyboard, with 500 models.

A copy of the page gets a script behind its own that acts as a person does and writes down what it sees; Chromium runs
it and gives the document back. Skipped where there is no Chromium (Debian: `apt-get install chromium`).
"""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from orchestration.lineage.graph import Graph
from orchestration.lineage.page import write_page
from tests.harness.lineage import graph_of, manifest_of, wide_graph

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")

TOOLS = """
<pre id="seen"></pre>
<script>
// In a block of its own: the page has names at the top level, too.
(() => {
const errors = [];
addEventListener("error", e => errors.push(e.message));
addEventListener("securitypolicyviolation", e => errors.push("fetched: " + e.blockedURI));
const byId = id => document.getElementById(id);
function press(key, on) {
  const event = new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true});
  (on || document.activeElement).dispatchEvent(event);
}
function type(text) {
  byId("search").value = text;
  byId("search").dispatchEvent(new Event("input", {bubbles: true}));
}
const chosen = () => lineage.chosen === null ? null : lineage.title(lineage.columns[lineage.chosen]);
const results = () => [...document.querySelectorAll("#results li[role=option]")].map(one => one.textContent);
function colours() {
  const canvas = byId("map"), seen = new Set();
  const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  for (let i = 0; i < data.length; i += 4) seen.add((data[i] << 16) + (data[i + 1] << 8) + data[i + 2]);
  return seen;
}
// What the page would draw at its next frame.
const frame = async () => paint();
async function act() { ACT }
(async () => {
  let seen;
  try { await frame(); seen = await act(); } catch (e) { errors.push(String(e)); }
  byId("seen").textContent = JSON.stringify({seen, errors});
})();
})();
</script>
"""


def drive(graph: Graph, folder: Path, script: str, at: str = "") -> dict[str, Any]:
    """Open the page, act, and give back what was seen; fails on any error of the page."""
    page = write_page(graph, folder / "lineage.html")
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:|//)""", text), "the page is offline"
    page.write_text(text.replace("</body>", TOOLS.replace("ACT", script, 1) + "</body>"), encoding="utf-8")
    assert CHROMIUM is not None
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--window-size=1400,900",
            f"--user-data-dir={folder / 'profile'}",
            "--dump-dom",
            page.as_uri() + at,
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    told: dict[str, Any] = json.loads(html.unescape(found[1]))
    assert told["errors"] == []
    seen: dict[str, Any] = told["seen"]
    return seen


@pytest.fixture
def graph() -> Graph:
    pii = {"pii": True}
    return graph_of(
        manifest_of(
            {
                "stg": "select id, email, at from raw.people where at is not null",
                "dim_people": "select id, md5(email) as who, max(at) as last_at from main.stg group by 1, 2",
            },
            sources={"people": {"id": {}, "email": pii, "at": {}}},
            columns={"stg": {"email": pii}, "dim_people": {"who": {"barrier": "hash"}}},
        )
    )


def test_the_page_is_searched_and_walked_by_keyboard(graph: Graph, tmp_path: Path) -> None:
    seen = drive(
        graph,
        tmp_path,
        """
        const out = {};
        press("/", document.body);
        out.focused = document.activeElement.id;
        type("email");
        out.results = results();
        press("ArrowDown"); press("ArrowDown");
        out.second = chosen();
        press("ArrowUp"); press("Enter");
        out.first = chosen();
        out.onMap = document.activeElement.id;
        out.hash = decodeURIComponent(location.hash);
        press("ArrowRight"); out.right = chosen();
        press("ArrowRight"); out.end = chosen();
        out.path = lineage.pathText();
        out.shownPath = [...document.querySelectorAll("#path button")].map(one => one.textContent);
        out.details = byId("details").textContent;
        press("ArrowLeft"); out.left = chosen();
        press("ArrowDown"); out.below = chosen();
        out.after = [...lineage.down.keys()].map(i => lineage.title(lineage.columns[i]));
        out.before = [...lineage.up.keys()].map(i => lineage.title(lineage.columns[i]));
        const zoom = lineage.view.k;
        press("+", byId("map")); out.nearer = lineage.view.k > zoom;
        press("-", byId("map")); press("0", byId("map"));
        out.all = lineage.view.k;
        press("Escape"); out.none = chosen();
        byId("personal").click(); type("");
        out.personal = results();
        type("nothing like it"); out.nothing = byId("results").textContent;
        return out;
        """,
    )
    assert seen["focused"] == "search"
    assert seen["results"] == ["raw.people.email", "stg.email"]
    assert (seen["second"], seen["first"]) == ("stg.email", "raw.people.email")
    assert seen["onMap"] == "map"
    assert seen["hash"] == "#raw.people.email"
    assert (seen["right"], seen["end"], seen["left"]) == ("stg.email", "dim_people.who", "stg.email")
    assert seen["path"] == "raw.people.email -> stg.email -> dim_people.who [ends: hash]"
    assert seen["shownPath"] == ["raw.people.email", "stg.email", "dim_people.who"]
    assert "personal data ends here: hash" in seen["details"]
    assert "MD5(stg.email)" in seen["details"]
    assert seen["below"] == "stg.at"
    assert (seen["before"], seen["after"]) == (["raw.people.at"], ["dim_people.last_at"])
    assert seen["nearer"] is True
    assert seen["none"] is None
    assert sorted(seen["personal"]) == ["dim_people.who", "raw.people.email", "stg.email"]
    assert seen["nothing"] == "nothing is called so"


def test_what_is_chosen_is_seen(graph: Graph, tmp_path: Path) -> None:
    """Its ways are drawn in colours the page without a choice does not have; filters only when asked for."""
    seen = drive(
        graph,
        tmp_path,
        """
        const before = colours(), out = {chosen: chosen()};
        type("stg.at"); press("Enter", byId("search")); await frame();
        out.more = [...colours()].filter(one => !before.has(one)).length;
        type("stg.email"); press("Enter", byId("search"));
        out.direct = lineage.up.size + lineage.down.size;
        byId("indirect").click(); await frame();
        out.withIndirect = lineage.up.size + lineage.down.size;
        const box = byId("map").getBoundingClientRect(), d = lineage.datasets.find(one => one.name === "stg");
        const clientX = box.left + (d.x + 40 - lineage.view.x) * lineage.view.k;
        const clientY = box.top + (d.y + 70 - lineage.view.y) * lineage.view.k;
        const at = {clientX, clientY, pointerId: 1, bubbles: true};
        byId("map").setPointerCapture = () => {};
        byId("map").dispatchEvent(new PointerEvent("pointerdown", at));
        byId("map").dispatchEvent(new PointerEvent("pointerup", at));
        out.clicked = chosen();
        return out;
        """,
        at="#dim_people.who",
    )
    assert seen["chosen"] == "dim_people.who"
    assert seen["more"] > 0
    assert seen["withIndirect"] > seen["direct"]
    assert seen["clicked"] == "stg.email"


def test_500_models_are_usable(tmp_path: Path) -> None:
    """All of it is there and answers: a search, a choice and a whole way through ten layers."""
    graph = wide_graph(500, 20)
    seen = drive(
        graph,
        tmp_path,
        """
        const out = {columns: lineage.columns.length};
        await frame(); out.drawn = colours().size;
        type("m_0499 c03"); out.found = results();
        press("Enter", byId("search")); out.chosen = chosen(); await frame();
        out.up = lineage.up.size;
        let steps = 0;
        for (let before = null; steps < 50 && before !== chosen(); steps++) {
          before = chosen();
          press("ArrowLeft", byId("map"));
        }
        steps--;
        out.steps = steps; out.origin = chosen();
        type("c0"); out.many = document.querySelectorAll("#results li").length;
        return out;
        """,
    )
    assert seen["columns"] == 501 * 21
    assert seen["drawn"] > 3
    assert seen["found"] == ["m_0499.c03"]
    assert seen["chosen"] == "m_0499.c03"
    assert seen["up"] > 20
    assert (seen["steps"], seen["origin"]) == (10, "raw.events.c03")
    assert seen["many"] == 301
