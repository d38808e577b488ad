"""The page of a gateway: it requests only what the server upstream knows, and shows that server's figures."""

from __future__ import annotations

from http_testing import PROMPT, eventually, live

from draft.target import TextTarget
from serving.api.app import create_app
from serving.engine import Engine
from serving.upstream import Upstream


def test_answers_come_without_origins_and_with_the_figures_of_the_server(open_page, tiny_target, tiny_head) -> None:
    engine = Engine(tiny_target, tiny_head, speculation="chain")
    texts = TextTarget("tiny", tiny_target.tokenizer, tiny_target.config, tiny_target.vocab_size)
    with live(create_app(engine)) as behind:
        upstream = Upstream(behind, texts, poll_seconds=0.3)
        upstream.connect()
        with live(create_app(upstream)) as url:
            page = open_page(url)
            assert "by draft-serve" in page.text("#served") and page.text("#notice") == ""
            page.choose("raw")
            assert page.run(prompt=PROMPT, max_new_tokens=24) == ""
            assert {token["kind"] for token in page.tokens()} == {"unsaid"} and len(page.tokens()) == 24
            assert " of " in page.figure("accepted") and float(page.figure("tau")) >= 1
            assert not page.find("#legend").is_displayed()
            assert page.run("#compare") == ""
            assert "identical" in page.text("#verdict .identity")
            counts = upstream.draft_counts
            eventually(lambda: (counts().drafts or 0) > 0)
            page.driver.refresh()
            page.until(lambda: f"acceptance length {counts().acceptance_length:.2f}" in page.text("#served"))
