"use strict";
// What JavaScript adds: one word of the answer or one head by itself, and numbers under the pointer.
(async () => {
  const KINDS = ["attended", "kept", "missed"];
  const byId = (id) => document.getElementById(id);
  const all = (selector) => [...document.querySelectorAll(selector)];
  const meta = JSON.parse(byId("meta").textContent);
  const tokens = all("#text .t"), words = all(".word:enabled"), cells = all(".cell");
  const special = tokens.map((token) => token.classList.contains("special"));
  const index = new Map(tokens.map((token, i) => [token, i]));
  const positions = meta.positions.flatMap(([start, stop]) => Array.from({ length: stop - start }, (_, i) => start + i));
  const codes = new Uint8Array(await unpack("codes"));
  const grid = new Uint16Array(await unpack("grid"));
  const lists = ["attended", "missed"].map((kind) => ({ kind, at: byId(`most-${kind}`), whole: [...byId(`most-${kind}`).children] }));
  let row = 0;  // what is shown: 0 the whole answer, then the heads, then the words of the answer

  async function unpack(id) {
    const bytes = Uint8Array.from(atob(byId(id).textContent), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).arrayBuffer();
  }

  const codesOf = (kind) => {
    const start = (row * KINDS.length + kind) * meta.tokens;
    return codes.subarray(start, start + meta.tokens);
  };
  const shade = (value, bounds) => bounds.filter((bound) => value >= bound).length;
  const percent = (share) => share === 0 ? "0 %" : `${share >= 0.0095 ? (100 * share).toFixed(1) : Number((100 * share).toPrecision(2))} %`;
  const toMass = (code) => code === 0 ? 0 : meta.lowestMass ** (1 - code / 255);
  const mass = (code) => code === 0 ? `below ${percent(meta.lowestMass)}` : percent(toMass(code));

  function paint() {
    const rows = KINDS.map((_, kind) => codesOf(kind));
    const bounds = KINDS.map((kind) => kind === "kept" ? meta.shareBounds : meta.massBounds);
    tokens.forEach((token, i) => {
      const shades = KINDS.map((kind, k) => kind[0] + shade(rows[k][i], bounds[k]));
      token.className = `t ${shades.join(" ")}${special[i] ? " special" : ""}`;
    });
    const pass = Math.max(0, row - meta.heads);  // 0: the mean over all of them
    cells.forEach((cell, head) => {
      const shares = KINDS.map((_, kind) => grid[(pass * KINDS.length + kind) * meta.heads + head] / 65535);
      cell.className = `cell ${KINDS.map((kind, k) => kind[0] + shade(shares[k], meta.gridBounds)).join(" ")}`;
      cell.title = `${percent(shares[0])} of its attention was paid to the text`;
      [...cell.children].forEach((child, i) => { child.textContent = (100 * shares[1 + i]).toFixed(1); });
    });
  }

  // The passages of one word or head; those of the whole answer are on the page already.
  function list({ kind, at, whole }) {
    if (row === 0) return at.replaceChildren(...whole);
    const [masses, kept] = [kind, "kept"].map((name) => codesOf(KINDS.indexOf(name)));
    let end = 0;
    const found = meta.positions.map(([start, stop]) => {
      const first = end;
      end += stop - start;
      const own = Array.from({ length: stop - start }, (_, i) => first + i);
      const weigh = (sum, i) => sum + (special[i] || positions[i] === 0 ? 0 : toMass(masses[i]));
      return { start, own, mass: own.reduce(weigh, 0), kept: own.reduce((sum, i) => sum + kept[i] / 255, 0) / own.length };
    });
    found.sort((a, b) => b.mass - a.mass);
    at.replaceChildren(...found.slice(0, meta.listed).filter(({ mass }) => mass >= meta.seen).map((passage) => {
      const item = document.createElement("li"), link = document.createElement("a"), note = document.createElement("small");
      link.href = `#t${passage.start}`;
      link.textContent = passage.own.map((i) => special[i] ? "" : tokens[i].textContent).join("").trim();
      note.textContent = `${kind} ${percent(passage.mass)}; ${passage.start >= meta.window ? "always read" : `kept by ${percent(passage.kept)} of the ${counted()}`}`;
      item.append(link, " ", note);
      return item;
    }));
  }

  const isHead = () => row > 0 && row <= meta.heads;
  const counted = () => isHead() ? "passes" : "heads";

  function scope() {
    if (row === 0) return "The whole answer, all layers and heads.";
    if (isHead()) return `Layer ${Math.floor((row - 1) / meta.headsPerLayer)}, head ${(row - 1) % meta.headsPerLayer}, the whole answer.`;
    const word = words[row - meta.heads - 1];
    return `“${word.textContent}”, all layers and heads: ${word.title}.`;
  }

  function show(wanted) {
    row = wanted === row ? 0 : wanted;
    for (const button of [...words, ...cells]) button.setAttribute("aria-pressed", Number(button.dataset.row) === row);
    byId("scope-text").textContent = scope();
    byId("reset").hidden = row === 0;
    byId("tip").hidden = true;
    paint();
    lists.forEach(list);
  }

  function tip(event) {
    const i = index.get(event.target), box = byId("tip");
    box.hidden = i === undefined;
    if (box.hidden) return;
    const [attended, kept, missed] = KINDS.map((_, kind) => codesOf(kind)[i]);
    box.textContent = `token ${positions[i].toLocaleString("en")}: “${tokens[i].textContent.trim()}”\n` +
      `attended ${mass(attended)}\nkept by ${percent(kept / 255)} of the ${counted()}\nmissed ${mass(missed)}`;
    const at = tokens[i].getBoundingClientRect(), size = box.getBoundingClientRect();
    const below = at.bottom + 8;
    box.style.left = `${Math.max(4, Math.min(at.left, innerWidth - size.width - 4))}px`;
    box.style.top = `${below + size.height < innerHeight ? below : at.top - size.height - 8}px`;
  }

  for (const button of [...words, ...cells]) button.addEventListener("click", () => show(Number(button.dataset.row)));
  byId("reset").addEventListener("click", () => show(0));
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") show(0); });
  byId("text").addEventListener("mouseover", tip);
  byId("text").addEventListener("click", tip);
  byId("text").addEventListener("mouseleave", () => { byId("tip").hidden = true; });
  document.documentElement.classList.add("js");
})();
