"use strict";
/* Pages of data by name, from the server or, where the page was exported, from files beside it: a browser reads no JSON from
   a disk, but it runs scripts. */

ExSearch.data = (() => {
  const exported = document.querySelector('meta[name="exsearch-data"]').content === "files";
  const kept = new Map();
  const waiting = new Map();
  const MOST_KEPT = 2000;

  function put(name, value) {
    waiting.get(name)?.(value);
    waiting.delete(name);
  }

  function fromFile(name) {
    return new Promise((resolve, reject) => {
      waiting.set(name, resolve);
      const script = document.createElement("script");
      script.src = `data/${name}.js`;
      script.onload = () => script.remove();
      script.onerror = () => reject(new Error(`data/${name}.js is missing: copy the whole folder`));
      document.head.append(script);
    });
  }

  async function fromServer(name) {
    let answer;
    try {
      answer = await fetch(`api/${name}`);
    } catch {
      throw new Error("the server of this page does not answer; start exsearch view again");
    }
    const text = await answer.text();
    let value;
    try {
      value = JSON.parse(text);
    } catch {
      throw new Error(`the server answered with status ${answer.status}: ${text.slice(0, 200)}`);
    }
    if (!answer.ok) throw Object.assign(new Error(value.error), { gone: answer.status === 404 });
    return value;
  }

  /* `keep`: it will always be as it is now. Of a run that goes on, that is only what is of a finished source. */
  function load(name, keep = name === "runs") {
    if (kept.has(name)) return kept.get(name);
    const value = exported ? fromFile(name) : fromServer(name);
    if (keep || exported) {
      value.catch(() => kept.delete(name));
      kept.set(name, value);
      if (kept.size > MOST_KEPT) kept.delete(kept.keys().next().value);
    }
    return value;
  }

  /* All runs; of those that cannot be read why. */
  async function runs() {
    const list = await load("runs");
    return Promise.all(list.runs.map(async (run, at) => {
      try {
        return { ...run, at, live: list.live, perPage: list.per_page, linesPerPage: list.lines_per_page, ...(await load(`run/${at}`)), error: null };
      } catch (error) {
        return { ...run, at, live: list.live, sources: [], report: null, status: null, error: error.message };
      }
    }));
  }

  /* One run, and its name among all. */
  async function run(at) {
    const list = await load("runs");
    if (!list.runs[at]) throw new Error("there is no such run");
    return { ...list.runs[at], at, live: list.live, perPage: list.per_page, linesPerPage: list.lines_per_page, ...(await load(`run/${at}`)) };
  }

  /* CRC-32 of a text: by that of its id a question is found. */
  function checksum(text) {
    let value = ~0;
    for (const byte of new TextEncoder().encode(text)) {
      value ^= byte;
      for (let bit = 0; bit < 8; bit += 1) value = (value >>> 1) ^ (value & 1 ? 0xedb88320 : 0);
    }
    return ~value >>> 0;
  }

  return { load, put, runs, run, checksum, exported };
})();
