"""The demo without a server: the page's HTML, and what its handlers return."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason='needs the extra "demo"')
pytest.importorskip("open_clip")

from defense.classify.classifier import RobustClassifier
from defense.demo import cards, engine, loading, measured, trying, views
from defense.errors import ConfigError, install_command
from defense.hosts.clip import EMBEDDED
from defense.hosts.controls import Controls

from .files import file_of


@pytest.fixture(scope="module")
def demo() -> engine.Engine:
    """The engine of the embedded model."""
    return loading.defended(EMBEDDED, device="cpu")


@pytest.fixture(scope="module")
def photo_tab() -> trying.Trying:
    """The first tab of the model that is taken where none is named."""
    engine = loading.defended(device="cpu")
    return trying.Trying(engine, cards.Gallery(engine))


@pytest.fixture
def tab(demo) -> trying.Trying:
    return trying.Trying(demo, cards.Gallery(demo))


@pytest.fixture
def form(tab) -> trying.Form:
    return trying._first_form(tab)


# --- the page's HTML --------------------------------------------------------------------------------------------------

EVIL = '<script>alert("1")</script>'


def test_text_from_outside_is_escaped_everywhere(tab, form):
    shown = "".join(tab.show(replace(form, labels=f"{EVIL}, <b>dog</b>")))
    assert "<script" not in shown
    assert "<b>" not in shown
    assert "&lt;script&gt;alert(&quot;1&quot;)" in shown
    assert "<script" not in views.message(EVIL)


def test_a_latent_is_named_by_a_key_that_can_be_read_back():
    place = ("blocks.2.hook_resid_post", 17)
    assert views.key_of(views.text_of(place)) == place


# --- the first tab ----------------------------------------------------------------------------------------------------


def answers_in(html: str) -> dict[str, str]:
    parts = html.split('data-answer="')[1:]
    return {part.split('"')[0]: part.split(">")[1].split("<")[0] for part in parts}


def test_the_page_opens_with_a_word_that_fools_plain_clip_and_not_the_defended_one(tab, form):
    assert answers_in(tab.show(form)[1]) == {"plain": form.word, "robust": tab.examples[0].title}


def test_at_strength_0_both_answers_are_equal_and_nothing_was_removed(tab, form):
    _, answers, removed, _ = tab.show(replace(form, strength=0.0))
    assert len(set(answers_in(answers).values())) == 1
    assert "bit for bit" in removed
    assert 'class="n up"' not in answers
    assert 'class="n down"' not in answers


def test_what_the_tab_answers_is_what_the_library_answers(tab, form):
    clf = RobustClassifier.from_pretrained(EMBEDDED, device="cpu").set_labels(tab.engine.tasks[0].labels)
    want = clf.explain(form.picture)
    question = tab.question(form)
    got = tab.engine.explain(form.picture, question)
    assert got.plain == want.plain
    assert [(r["label"], pytest.approx(r["score"], abs=1e-5)) for r in got.robust[:3]] == [
        (r["label"], r["score"]) for r in want.robust[:3]
    ]


def test_visitors_do_not_see_each_others_labels(demo, form):
    picture = form.picture
    questions = [demo.question(", ".join(labels), "") for labels in (("apple", "pizza"), ("dog", "cat", "cow"))]
    wrong = []

    def ask(question):
        for _ in range(5):
            if {row["label"] for row in demo.explain(picture, question).plain} != set(question.labels):
                wrong.append(question)

    threads = [threading.Thread(target=ask, args=(question,)) for question in questions * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_embeddings_of_labels_do_not_pile_up(demo, form):
    for i in range(engine._MAX_VOCABULARIES + 5):
        demo.classify(form.picture, demo.question(f"dog, cat {'x' * i}", ""))
    assert len(demo.clf._text_embeds) <= engine._MAX_VOCABULARIES


def test_labels_that_the_model_never_saw_are_named_each_time(tab, form):
    for _ in range(2):
        assert "zebra" in tab.show(replace(form, labels="zebra, dog"))[3]
    assert tab.show(replace(form, labels="cat, dog"))[3] == ""


def test_a_latent_is_switched_off_and_on_again(tab, form):
    latent = tab.engine.explain(form.picture, tab.question(form)).removed[0]
    key = views.text_of((latent.hook_point, latent.latent))
    off, _, _, _, answers, removed, _ = tab.latent("switch", key, False, form)
    assert off == (key,)
    assert "left alone" in removed
    assert answers != tab.show(form)[1]
    off, _, _, *shown = tab.latent("switch", key, True, replace(form, off=off))
    assert off == ()
    assert answers_in(shown[1]) == answers_in(tab.show(form)[1])


def test_pressing_a_latent_shows_its_own_map_and_its_card(tab, form):
    latent = tab.engine.explain(form.picture, tab.question(form)).removed[1]
    key = views.text_of((latent.hook_point, latent.latent))
    _, focus, card, _, _, removed, _ = tab.latent("focus", key, True, form)
    assert focus == key
    assert f"where · latent {latent.latent}" in removed
    assert f"Latent {latent.latent}" in card
    assert "why it was chosen" in card
    for score in cards.SCORES:
        assert score in card


def test_counterfactual_names_latents_that_flip_the_answer(tab, form):
    said = tab.counterfactual(form)
    assert f'turns "{form.word}" into' in said


def test_the_panel_of_patches_counts_what_the_library_reads(demo, tab, form):
    from defense.explain.patches import patch_labels

    html, question = tab.patches(form), tab.question(form)
    asked = copy.copy(demo.clf).set_labels(question.labels, [form.template])
    found = patch_labels(asked, form.picture, controls=question.controls)
    assert dict(found.shares(robust=True)).get("pizza", 0) < dict(found.shares())["pizza"], "the word is taken out"
    for name, robust in (("plain", False), ("robust", True)):
        label, share = found.shares(robust=robust)[0]
        row = next(each for each in html.split("<tr>") if f"</span>{label}</th>" in each)
        assert f'<span class="bar {name}" style="width:{100 * share:.1f}%">' in row
    assert html.count("<img") == 2
    plain, robust = html.split("<img")[1:]
    assert plain.split('alt="')[0] != robust.split('alt="')[0]


def test_the_panel_of_patches_heeds_strength_labels_and_a_missing_picture(tab, form):
    maps = [each.split('alt="')[0] for each in tab.patches(replace(form, strength=0.0)).split("<img")[1:]]
    assert maps[0] == maps[1]
    shown = tab.patches(replace(form, labels=f"{EVIL}, <b>dog</b>"))
    assert "<script" not in shown
    assert "<b>" not in shown
    assert tab.patches(replace(form, loaded=None)) == ""


def test_an_upload_replaces_the_picture_and_clears_what_belonged_to_the_last(tab, form):
    data = file_of(Image.new("RGB", (50, 50), "red"))
    loaded, off, focus, card, word, *shown = tab.upload(data, replace(form, off=("blocks.2.hook_resid_post:1",)))
    assert loaded.image.size == (50, 50)
    assert (off, focus, card, word) == ((), "", "", "")
    assert "50 x 50 pixels" in shown[0]


def test_an_error_becomes_a_message_and_leaves_the_rest_as_it_is(tab, form):
    handler = trying.friendly(lambda *_: tab.upload(b"<html>", form), 9)
    *kept, said = handler()
    assert len(kept) == 8
    assert all(each == kept[0] for each in kept)
    assert 'role="alert"' in said
    assert "not a picture" in said


def test_putting_the_word_follows_the_press_and_the_keyboard_moves_it(tab, form):
    assert tab.put("0.25", "0.75", form)[:2] == (0.25, 0.75)
    assert tab.put("-3", "7", form)[:2] == (0.0, 1.0)
    rows = []
    for _ in range(3):
        form = replace(form, y=tab.put("", "", form)[1])
        rows.append(form.y)
    assert sorted(rows) == list(trying._ROWS)


def test_every_example_can_be_chosen_and_the_defense_is_right(tab, form):
    right = {"landbird on water": "landbird", "waterbird on land": "waterbird"}
    right |= {"blond man": "blond hair", "dark-haired woman": "dark hair"}
    for index, example in enumerate(tab.examples):
        loaded, *_, answers, _, _ = tab.choose(index, form)
        assert loaded.image == example.picture
        found = answers_in(answers)
        assert found["robust"] == right.get(example.title, example.title)
        assert found["plain"] != found["robust"]


def test_of_the_photographs_those_with_a_word_fool_plain_clip_alone_and_the_others_neither(photo_tab):
    form = trying._first_form(photo_tab)
    assert [example.title for example in photo_tab.examples] == ["cat", "espresso", "tripod", "rocket"]
    for index, example in enumerate(photo_tab.examples):
        loaded, *_, answers, _, _ = photo_tab.choose(index, form)
        found = answers_in(answers)
        clean = answers_in(photo_tab.show(replace(form, loaded=loaded, word=""))[1])
        assert clean["plain"] == clean["robust"]
        assert found == ({"plain": example.word, "robust": clean["plain"]} if example.word else clean)


def test_weights_of_no_model_are_refused():
    with pytest.raises(ConfigError, match="there is no model="):
        loading.defended(pretrained="openai")


def test_a_bundle_is_an_engine_without_a_plain_side(tiny_bundle):
    found = loading.bundled(tiny_bundle)
    picture = Image.effect_noise((50, 40), 90).convert("RGB")
    question = found.question("", "")
    assert (found.can_explain, found.can_relabel) == (False, True)
    assert {row["label"] for row in found.classify(picture, question)} == set(question.labels)
    assert found.embed(picture).shape == found.clf.transform([picture])[0].shape
    assert found.set_of("blocks.1.hook_resid_post", 3) is None
    for call in (
        lambda: found.embed(picture, plain=True),
        lambda: found.explain(picture, question),
        lambda: found.counterfactual(picture, question),
        lambda: found.phrase("fire", "{}"),
        lambda: found.activation_map(picture, "blocks.1.hook_resid_post", 3),
    ):
        with pytest.raises(ConfigError, match="a bundle holds the defended tower alone"):
            call()


def test_an_engine_loads_no_exported_graph_to_say_that_it_may_hold_one():
    code = "import defense.demo.engine, sys; sys.exit(any(name.startswith('defense.export') for name in sys.modules))"
    assert without([], code).returncode == 0


# --- what is known of latents -----------------------------------------------------------------------------------------


def test_without_a_catalogue_the_card_says_so(demo, form):
    bare = replace(demo, catalogues={})
    card = cards.card(bare, cards.Gallery(bare), ("blocks.2.hook_resid_post", 5), form.picture)
    assert cards.NO_CATALOGUE in card
    assert "left alone by the defense" in card


@pytest.fixture
def catalogued(demo):
    """The engine with a made-up catalogue of its first site: ten pictures, three words."""
    from defense.explain.catalogue import BIN_EDGES, Catalogue

    site = demo.clf.defense.sites[0]
    d_sae, d_embed = site.parameters["W_dec"].shape[0], 128
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(d_sae, d_embed)).astype(np.float32)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    directions[7] = demo.phrase("fire", "a photo of a {}.")
    words = ("apple", "pizza", "dog")
    made = Catalogue(
        site.hook_point,
        {
            "steerability": np.arange(d_sae, dtype=np.float32),
            "monosemanticity": np.full(d_sae, np.nan, np.float32),
            "largest_activation": np.full(d_sae, 8.0, np.float32),
        },
        tuple(((words[i % 3], 0.5),) if i % 2 else () for i in range(d_sae)),
        directions.astype(np.float16),
        np.tile(np.array([0, 1, -1], np.int32), (d_sae, 1)),
        np.tile(np.array([3.0, 2.0, 0.0], np.float32), (d_sae, 1)),
        np.tile(np.arange(len(BIN_EDGES) - 1, dtype=np.int32), (d_sae, 1)),
        tuple(f"scene:51:{i}" for i in range(1, 11)),
    )
    return replace(demo, catalogues={site.hook_point: made})


def test_a_card_holds_names_pictures_histogram_and_numbers(catalogued):
    hook_point = next(iter(catalogued.catalogues))
    card = cards.card(catalogued, cards.Gallery(catalogued), (hook_point, 4001 % 3072 | 1))
    assert card.count("<figure>") == 2  # two pictures; the third index says that there is none
    assert '<ol class="names"><li>' in card
    assert "<svg" in card
    assert "steerability" in card


@pytest.mark.parametrize(
    ("query", "sort", "first"),
    [("", "steerability", 3071), ("5", "steerability", 5), ("PIZ", "steerability", 3067), ("fire", "steerability", 7)],
    ids=["all", "number", "name", "phrase"],
)
def test_latents_are_found_by_number_name_and_phrase(catalogued, query, sort, first):
    hook_point = next(iter(catalogued.catalogues))
    html = cards.listed(catalogued, cards.Gallery(catalogued), hook_point, query, sort)
    assert html.split('data-place="')[1].split('"')[0] == f"{hook_point}:{first}"


def test_a_number_that_is_no_latent_is_said_to_be_none(catalogued):
    hook_point = next(iter(catalogued.catalogues))
    assert "There is no latent 99999" in cards.listed(catalogued, cards.Gallery(catalogued), hook_point, "99999", "")


def test_steering_starts_from_the_plain_answer_and_moves_it(catalogued, form):
    from defense.demo.browsing import Browsing

    browsing = Browsing(catalogued, cards.Gallery(catalogued))
    hook_point = next(iter(catalogued.catalogues))
    latent = catalogued.explain(form.picture, browsing.trying.question(form)).removed[0].latent
    key, slider, _, card = browsing.open(views.text_of((hook_point, latent)), form)
    assert slider["maximum"] == 12.0
    assert f"Latent {latent}" in card
    (shown,) = browsing.steer(key, 60.0, form)
    assert 'class="n same"' not in shown.split("<tbody>")[1].split("</tr>")[0]
    assert f"latent {latent} at 60" in shown


# --- the third tab ----------------------------------------------------------------------------------------------------


def test_stored_results_become_tables(tmp_path):
    found = measured.sections(measured.results_folder())
    assert any("| defended |" in section for section in found)
    assert not [section for section in found if "@" in section], "a browser makes an address of it"
    assert not [section for section in found if "cannot be shown" in section]
    assert measured.sections(tmp_path) == [measured.NOTHING]
    (tmp_path / "embedded.json").write_text("{}")
    assert "cannot be read" in measured.sections(tmp_path)[0]


def test_plots_travel_in_the_page(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "typographic-strength.png")
    html = measured.plots(tmp_path)
    assert 'src="data:image/png;base64,' in html
    assert "typographic strength" in html


def test_the_load_test_states_quantiles_of_its_times():
    from defense.benchmarks.demo import quantiles

    assert quantiles([float(i) for i in range(1, 102)]) == {"p50": 51.0, "p95": 96.0, "max": 101.0}
    assert quantiles([7.0]) == {"p50": 7.0, "p95": 7.0, "max": 7.0}
    assert quantiles([]) == {}


def test_controls_reach_the_model(demo, form):
    full, none = (demo.classify(form.picture, demo.question("", "", Controls(s)))[0]["label"] for s in (1.0, 0.0))
    assert (full, none) == ("apple", "pizza")


def without(modules: list[str], code: str, *arguments: object) -> subprocess.CompletedProcess:
    script = "import json, sys\nfor name in json.loads(sys.argv[1]): sys.modules[name] = None\n" + code
    command = [sys.executable, "-P", "-c", script, json.dumps(modules), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_fault_70_without_gradio_the_command_says_what_to_install():
    done = without(["gradio"], "from defense.cli import main; sys.argv = ['defense', 'demo']; main()")
    assert done.returncode == 3
    assert install_command("demo") in done.stderr.replace("\n", "")


def test_no_rule_for_narrow_pages_names_the_container_since_gradio_puts_it_before_each_selector():
    sheet = (Path(loading.__file__).parent / "page.css").read_text(encoding="utf-8")
    narrow = sheet.partition("@media (max-width")[2]
    rules = narrow.partition("\n")[2]
    assert ".columns" in rules
    assert ".gradio-container" not in rules
