"use strict";
/* Which page is shown, by what stands behind the # of the address. */

(() => {
  const { h } = ExSearch;
  const main = document.getElementById("main"), trail = document.getElementById("trail"), stale = document.getElementById("stale");
  const REFRESH_MS = 5000;
  let current = null, timer = null, turn = 0;

  function frame(title, steps) {
    document.title = `${title} – ExSearch`;
    trail.replaceChildren(...steps.flatMap(([text, href]) => [" / ", href ? h("a", { href }, text) : h("span", {}, text)]));
  }

  ExSearch.fail = (error) => {
    current?.close?.();
    current = null;
    stale.textContent = "";
    frame("not shown", []);
    main.replaceChildren(h("h1", {}, "This cannot be shown"), h("p", { role: "alert" }, error.message));
    main.focus({ preventScroll: true });
  };

  async function pageFor(address) {
    const [path, query = ""] = address.replace(/^#?\/?/, "").split("?");
    const [place, number, kind, key, id] = path.split("/");
    const at = Number(number);
    if (!place) return ExSearch.runs.overview();
    if (place !== "run" || !/^\d+$/.test(number ?? "")) throw new Error("there is no such page");
    if (!kind) return ExSearch.runs.page(at);
    if (kind === "questions" && key) return ExSearch.questions.page(at, key, new URLSearchParams(query));
    if (kind === "question" && id) {
      const where = new URLSearchParams(query).get("in") ?? "";
      return ExSearch.question.page(at, key, decodeURIComponent(id), /^[\w-]+\/\d+$/.test(where) ? where : null);
    }
    throw new Error("there is no such page");
  }

  /* Where an element stands: its places among its parents' children. */
  function pathTo(element) {
    const path = [];
    for (let one = element; one !== main; one = one.parentElement) path.unshift([...one.parentElement.children].indexOf(one));
    return path;
  }

  const at = (path) => path.reduce((element, place) => element?.children[place], main);

  function draw(page) {
    current?.close?.();
    current = page;
    frame(page.title, page.trail);
    main.replaceChildren(...page.content.flat(Infinity).filter(Boolean));
    page.begin?.();
  }

  /* The same page with newer figures: what was open stays open, and the focus where it was. */
  function redraw(page) {
    const open = [...main.querySelectorAll("details")].map((element) => element.open);
    const inside = main.contains(document.activeElement) && document.activeElement !== main;
    const focused = inside ? [pathTo(document.activeElement), document.activeElement.tagName] : null;
    draw(page);
    [...main.querySelectorAll("details")].forEach((element, place) => { element.open = open[place] ?? element.open; });
    const again = focused && at(focused[0]);
    if (again?.tagName === focused?.[1]) again?.focus({ preventScroll: true });
  }

  async function show(how) {
    const mine = ++turn;
    clearTimeout(timer);
    let page = null;
    try {
      page = await pageFor(location.hash);
    } catch (error) {
      if (mine !== turn) return;
      if (how === draw) return ExSearch.fail(error);
      stale.textContent = `Not updated since ${new Date().toLocaleTimeString()}: ${error.message}`;
    }
    if (mine !== turn) return;
    if (page) {
      stale.textContent = "";
      how(page);
      if (how === draw) { main.focus({ preventScroll: true }); scrollTo(0, 0); }
    }
    if (current?.live) timer = setTimeout(() => show(redraw), REFRESH_MS);
  }

  addEventListener("hashchange", () => show(draw));
  show(draw);
})();
