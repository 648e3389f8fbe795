"use strict";
/* Which page is shown, by what stands behind the # of the address. */

(() => {
  const { h } = ExSearch;
  const main = document.getElementById("main"), trail = document.getElementById("trail");
  const REFRESH_MS = 5000;
  let current = null, timer = null, turn = 0;

  ExSearch.fail = (error) => {
    main.replaceChildren(h("h1", {}, "This cannot be shown"), h("p", { role: "alert" }, error.message));
  };

  function pageFor(address, how) {
    const [path, query = ""] = address.replace(/^#?\/?/, "").split("?");
    const [place, number, kind, key, id] = path.split("/");
    const at = Number(number);
    if (!place) return ExSearch.runs.overview(how);
    if (place !== "run" || !/^\d+$/.test(number ?? "")) throw new Error("there is no such page");
    if (!kind) return ExSearch.runs.page(at, how);
    if (kind === "questions" && key) return ExSearch.questions.page(at, key, new URLSearchParams(query));
    if (kind === "question" && id) return ExSearch.question.page(at, key, decodeURIComponent(id));
    throw new Error("there is no such page");
  }

  async function show({ fresh = false } = {}) {
    const mine = ++turn;
    clearTimeout(timer);
    let page;
    try {
      page = await pageFor(location.hash, { fresh });
    } catch (error) {
      if (mine === turn) { current?.close?.(); current = null; ExSearch.fail(error); }
      return;
    }
    if (mine !== turn) return;
    const open = fresh ? [...main.querySelectorAll("details")].map((element) => element.open) : [];
    const focused = fresh && main.contains(document.activeElement) && document.activeElement !== main;
    if (!(fresh && focused)) {
      current?.close?.();
      current = page;
      document.title = `${page.title} – ExSearch`;
      trail.replaceChildren(...page.trail.flatMap(([text, href]) => [" / ", href ? h("a", { href }, text) : h("span", {}, text)]));
      main.replaceChildren(...page.content.flat(Infinity).filter(Boolean));
      [...main.querySelectorAll("details")].forEach((element, place) => { element.open = open[place] ?? element.open; });
      page.begin?.();
      if (!fresh) { main.focus({ preventScroll: true }); scrollTo(0, 0); }
    }
    if (page.live) timer = setTimeout(() => show({ fresh: true }), REFRESH_MS);
  }

  addEventListener("hashchange", () => show());
  show();
})();
