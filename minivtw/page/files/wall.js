"use strict";
// The wall: the image at the left, one row of tokens per layer at the right, a red line at K that can be dragged.
const find = id => document.getElementById(id), all = selector => [...document.querySelectorAll(selector)];
const make = (tag, given = {}, ...inside) => {
  const made = Object.assign(document.createElement(tag), tag === "button" ? {type: "button"} : {}, given);
  made.append(...inside);
  return made;
};
const percent = share => (100 * share).toFixed(share < 0.0995 && share >= 0.0005 ? 1 : 0) + " %";
const shown = token => token.replaceAll("\n", "⏎").trim() || "␣";
const bytes = text => Uint8Array.from(atob(text), letter => letter.charCodeAt(0)).buffer;
const shares = packed => ({...packed, values: new Uint16Array(bytes(packed.values))});
const color = name => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
const within = (value, low, high) => Math.min(Math.max(value, low), high);

// Which words are not in the longest common subsequence with the right ones.
function changed(words, right) {
  const table = Array.from({length: words.length + 1}, () => Array(right.length + 1).fill(0));
  for (let i = words.length - 1; i >= 0; i--)
    for (let j = right.length - 1; j >= 0; j--)
      table[i][j] = words[i] === right[j] ? table[i + 1][j + 1] + 1 : Math.max(table[i + 1][j], table[i][j + 1]);
  const wrong = words.map(() => true);
  for (let i = 0, j = 0; i < words.length && j < right.length;)
    if (words[i] === right[j]) { wrong[i++] = false; j++; } else if (table[i + 1][j] >= table[i][j + 1]) i++; else j++;
  return wrong;
}

// source: {frame(K), eyes(token, frame, K)}, each an answer or a promise of one; null: something newer was asked for.
function Wall(source) {
  const wall = find("wall"), handle = find("handle"), canvas = find("cells"), gutter = 26;
  const state = {layers: 1, K: 0, layer: 0, token: null, head: "mean", way: "", frame: null, eyes: null, full: "", words: [], patches: [],
    away: new Set(), movable: true};
  const order = {text: [], visual: []};
  let turn = 0, patches = [], playing = null, rowHeight = 20, at = null;

  // asked: {words, patches, full}; words are the prompt's tokens, null where it is visual; patches, how many of each tile's are a token.
  function open(asked) {
    Object.assign(state, asked, {frame: null, eyes: null});
    state.layer = Math.min(state.layer, state.layers - 1);
    order.text = [];
    order.visual = [];
    state.words.forEach((word, i) => (word === null ? order.visual : order.text).push(i));
    if (state.token !== null && state.token >= state.words.length) state.token = null;
    handle.ariaValueMax = state.layers;
    find("layer").max = state.layers - 1;
    find("text-says").textContent = `${order.text.length} text tokens`;
    layPatches();
    find("visual-says").textContent = `${order.visual.length} visual tokens, ` + (patches[order.visual.length - 1] ? "one per patch"
      : `the first ${patches.length} one per patch; the tiles' are packed and not drawn`);
    return refresh();
  }

  function layPatches() {
    const tiles = all("#tiles .tile"), side = Math.round(Math.max(...state.patches) ** 0.5), step = 100 / side;
    find("tiles").style.gridTemplateColumns = `repeat(${Math.ceil(Math.max(tiles.length - 1, 1) ** 0.5)}, 1fr)`;
    tiles.forEach((tile, number) => {
      tile.querySelector("svg")?.remove();
      const rects = Array.from({length: state.patches[number]}, (_, i) =>
        `<rect class="patch" x="${i % side * step}" y="${Math.floor(i / side) * step}" width="${step}" height="${step}"/>`);
      tile.insertAdjacentHTML("beforeend", `<svg viewBox="0 0 100 100" preserveAspectRatio="none">${rects.join("")}</svg>`);
    });
    patches = all(".patch");
    patches.forEach((patch, i) => { patch.dataset.patch = i; });
    Object.assign(find("tiles"), {tabIndex: 0, role: "application",
      ariaLabel: `${patches.length} patches: arrow keys move, Enter lets one look, Delete takes it away`});
    find("tiles").dataset.side = side;
  }

  // Where the token looks in a layer, (tokens), by one head or on the mean; or who looks at it.
  function looks(layer) {
    const {tokens, heads} = state.eyes, eyes = state.way ? state.eyes.seen : state.eyes, sum = new Float64Array(tokens);
    if (state.way) return sum.map((_, i) => eyes.values[layer * tokens + i] * eyes.largest / 65535);
    for (let head = 0; head < heads; head++) {
      if (state.head !== "mean" && +state.head !== head) continue;
      const start = (layer * heads + head) * tokens, share = eyes.largest / 65535 / (state.head === "mean" ? heads : 1);
      for (let i = 0; i < tokens; i++) sum[i] += eyes.values[start + i] * share;
    }
    const marks = state.frame.layers[layer];
    for (let i = 0; i < marks.length; i++) if (marks[i] === "0") sum[i] = 0;
    return sum;
  }

  function drawAnswer() {
    const {frame, full} = state, words = frame.answer.split(/\s+/).filter(Boolean), wrong = changed(words, full.split(/\s+/));
    find("answer").replaceChildren(...(words.length ? words : ["…"]).flatMap((word, i) =>
      [make("span", {className: wrong[i] ?? true ? "wrong" : "", textContent: word}), " "]));
    const same = frame.answer === full;
    find("whole").textContent = same ? "as with the image in every layer" : `with the image in every layer: ${full}`;
    const less = ([now, without]) => (now <= without ? percent(1 - now / without) + " less" : percent(now / without - 1) + " more");
    for (const [name, unit, scale] of [["flops", "MFLOP", 1e6], ["cache", "kB", 1e3]]) {
      const [now, without] = frame[name];
      find(name).textContent = less(frame[name]);
      find(name + "-bar").style.width = within(100 * now / without, 0, 100) + "%";
      find(name + "-says").textContent = `${Math.round(now / scale)} of ${Math.round(without / scale)} ${unit} left`;
    }
    find("kl").textContent = frame.kl < 1e-6 ? "0" : frame.kl < 1e-4 ? "< 0.0001" : frame.kl.toPrecision(2);
    find("kl-bar").style.width = within(100 * (Math.log10(Math.max(frame.kl, 1e-5)) + 5) / 6, 0, 100) + "%";
    find("kl-says").textContent = frame.next.slice(0, 2).map(([word, share]) => `${shown(word)} ${percent(share)}`).join(", ");
  }

  function drawPicture() {
    const {frame, eyes, layer, layers} = state, tiles = find("tiles");
    tiles.classList.toggle("eyed", Boolean(eyes));
    const seen = eyes && looks(layer), most = seen && Math.max(...order.visual.map(i => seen[i]), 1e-9);
    const depths = order.visual.map(token => frame.layers.filter(marks => marks[token] !== "0").length);
    const deepest = Math.max(...depths, 0), held = depths.filter(depth => depth === deepest).length;
    const first = frame.layers.findIndex(marks => marks[order.visual[depths.indexOf(deepest)]] !== "0");
    let total = 0;
    order.visual.forEach((token, i) => {
      const patch = patches[i], here = frame.layers[layer][token] !== "0", depth = depths[i];
      if (seen) total += seen[token];
      if (!patch) return;
      const dark = eyes ? (here ? 0.88 * (1 - Math.sqrt(seen[token] / most)) : 0.88) : 0.86 * (1 - depth / layers);
      patch.style.fillOpacity = (state.away.has(token) ? 0.75 : dark).toFixed(3);
      patch.classList.toggle("on", state.token === token);
      patch.classList.toggle("away", state.away.has(token));
      patch.classList.toggle("at", at === i);
      patch.dataset.tip = `patch ${i}\n` + (state.away.has(token) ? "taken away" : eyes
        ? here ? percent(seen[token]) + " of the attention" : "not in this layer" : `in ${depth} of ${layers} layers`);
    });
    find("where").textContent = eyes
      ? (total ? `In layer ${layer} this token ${state.way ? "is looked at by the bright patches" : `gives ${percent(total)} of its attention to the image: the bright patches`}.`
        : `Layer ${layer} has no image to look at.`) + (state.words[state.token] === null && !state.way ? " It sees only what stands before it: the causal mask." : "")
      : !deepest ? "No layer sees the image." : `${held < depths.length ? `${held} of ` : ""}${depths.length} visual tokens reach `
        + (first + deepest === layers ? "the last layer" : deepest > 1 ? `layers ${first} … ${first + deepest - 1}` : `layer ${first}`) + ". The darker a patch, the fewer.";
  }

  function drawStack() {
    const wide = find("stack").clientWidth, {layers, frame, eyes, K} = state, scale = devicePixelRatio || 1;
    rowHeight = within(Math.round(420 / layers), 12, 30);
    if (canvas.width !== Math.round(wide * scale)) canvas.width = Math.round(wide * scale);
    canvas.height = (layers * rowHeight + 20) * scale;
    canvas.style.height = layers * rowHeight + 20 + "px";
    const pen = canvas.getContext("2d"), left = gutter + (source.paints ? 24 : 0), cells = [...order.text, ...order.visual];
    pen.scale(scale, scale);
    const unit = (wide - left) / cells.length, gap = unit > 6 ? 1.5 : unit > 3 ? 0.8 : 0, ink = {v: color("visual"), t: color("sink"), soft: color("soft"), grid: color("grid")};
    pen.font = `${Math.min(rowHeight - 1, 12)}px system-ui, sans-serif`;
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    for (let layer = 0; layer < layers; layer++) {
      const y = layer * rowHeight + 10, marks = state.guess?.(K, layer) ?? frame.layers[layer];
      const seen = eyes && looks(layer), most = seen && Math.max(...cells.map(i => seen[i] ?? 0), 1e-9);
      pen.globalAlpha = 1;
      pen.fillStyle = ink.soft;
      if (rowHeight > 13 || layer % 2 === 0) pen.fillText(layer, left - 6, y + rowHeight / 2);
      cells.forEach((token, i) => {
        const x = left + i * unit, isText = i < order.text.length, mark = marks[token];
        if (mark === "0") {
          pen.globalAlpha = 0.35;
          pen.fillStyle = ink.grid;
          pen.fillRect(x, y + rowHeight / 2 - 1, unit - gap, 2);
          return;
        }
        pen.globalAlpha = (mark === "1" ? 0.4 : 1) * (seen ? 0.12 + 0.88 * Math.sqrt((seen[token] ?? 0) / most) : 1);
        pen.fillStyle = isText ? ink.t : ink.v;
        const inset = mark === "1" ? rowHeight * 0.3 : 1.5;
        pen.fillRect(x, y + inset, Math.max(unit - gap, 0.7), rowHeight - 2 * inset);
      });
      if (eyes && layer === state.layer) {
        pen.globalAlpha = 1;
        pen.strokeStyle = color("ink");
        pen.lineWidth = 2;
        pen.strokeRect(left - 2, y, wide - left + 1, rowHeight);
      }
    }
    canvas.ariaLabel = `${layers} layers, one row each; ` + frame.layers.map((marks, i) =>
      `layer ${i}: ${[...marks].filter(mark => mark !== "0").length} tokens`).join(", ");
    find("frozen-says").hidden = !frame.layers.some(marks => marks.includes("1"));
  }

  function drawHandle() {
    const {K, layers, frame} = state;
    handle.hidden = !state.movable;
    find("play").hidden = !state.movable;
    handle.style.top = K * rowHeight + 10 + "px";
    find("knob").textContent = "K = " + K;
    find("leaves").textContent = K === layers ? ": drag me up" : K ? ": the image leaves" : ": it never comes in";
    handle.ariaValueNow = K;
    handle.ariaValueText = `before layer ${K} of ${layers}` + (frame ? `; the model says ${frame.answer}` : "");
  }

  function drawWords() {
    const {frame, eyes, layer, words} = state, seen = eyes && looks(layer), said = source.saysMore ? frame.tokens.slice(0, -1) : [];
    const active = document.activeElement?.dataset?.token;
    find("words").replaceChildren(...[...order.text.map(i => [i, words[i], ""]), ...said.map((word, i) => [words.length + i, word, "said"])].map(([i, word, kind]) => {
      const chip = make("button", {textContent: shown(word), className: kind, ariaPressed: state.token === i});
      chip.dataset.token = i;
      if (seen && seen[i]) {
        chip.style.background = `color-mix(in srgb, ${color("sink")} ${Math.round(55 * Math.sqrt(seen[i]))}%, ${color("paper")})`;
        chip.dataset.tip = percent(seen[i]) + " of the attention";
      }
      return chip;
    }));
    if (active) find("words").querySelector(`[data-token="${active}"]`)?.focus();
    find("looking").hidden = !eyes;
    if (!eyes) return;
    find("number").textContent = layer;
    find("layer").value = layer;
    find("heads").hidden = eyes.heads < 2;
    if (find("head").length !== eyes.heads + 1)
      find("head").replaceChildren(...["mean", ...Array(eyes.heads).keys()].map(name => make("option", {textContent: name})));
    find("head").value = state.head;
    find("ways").hidden = !eyes.seen;
    find("lens").textContent = eyes.readings ? "Layer by layer: " + eyes.readings.map(words => words ? shown(words[0][0]) : "–").join(" ") : "";
    const reading = eyes.readings?.[layer + 1];
    find("readings").parentNode.hidden = !eyes.readings;
    find("readings").replaceChildren(...(reading ?? [["nothing: it has left", 1]]).map(([word, share]) =>
      make("b", {textContent: reading ? `${shown(word)} ${percent(share)}` : word})));
  }

  function draw() {
    if (!state.frame) return drawHandle();
    drawAnswer();
    drawPicture();
    drawStack();
    drawHandle();
    drawWords();
    source.drawn?.(state);
  }

  function remember() {
    const parts = (state.movable ? [`K=${state.K}`] : []).concat(state.token === null ? [] : [`layer=${state.layer}`, `token=${state.token}`]);
    try { history.replaceState(null, "", "#" + parts.join("&")); } catch { /* a page without an address of its own */ }
  }

  // Ask for the state as it is now. Whatever answers an older state is dropped.
  async function refresh() {
    const mine = ++turn;
    wall.ariaBusy = true;
    if (state.frame) { drawStack(); drawHandle(); }
    remember();
    try {
      const frame = await source.frame(state.K);
      if (mine !== turn || !frame) return;
      const eyes = state.token === null ? null : await source.eyes(state.token, frame, state.K);
      if (mine !== turn) return;
      Object.assign(state, {frame, eyes});
      if (!eyes) state.token = null;
      source.failed?.("");
    } catch (error) {
      if (mine !== turn) return;
      source.failed?.(error.message);
    }
    wall.ariaBusy = false;
    draw();
  }

  function move(K) {
    K = within(K, 0, state.layers);
    if (K === state.K || !state.movable) return Promise.resolve();
    state.K = K;
    drawHandle();
    return refresh();
  }

  function look(token) {
    state.token = token;
    return refresh();
  }

  const answering = () => state.words.length - 1;
  function chooseLayer(layer) {
    state.layer = within(layer, 0, state.layers - 1);
    if (state.token === null) return look(answering());
    remember();
    return draw();
  }

  async function play() {
    if (playing) { playing = null; return; }
    const mine = playing = {};
    find("play").textContent = "■ Stop";
    if (state.K === 0) await move(state.layers);
    while (playing === mine && state.K > 0) {
      await Promise.all([move(state.K - 1), new Promise(done => setTimeout(done, 450))]);
    }
    if (playing === mine) playing = null;
    find("play").textContent = "▶ Play";
  }

  const rowAt = event => (event.clientY - canvas.getBoundingClientRect().top - 10) / rowHeight;
  handle.addEventListener("pointerdown", event => {
    playing = null;
    handle.setPointerCapture(event.pointerId);
    handle.focus({preventScroll: true});
    event.preventDefault();
  });
  handle.addEventListener("pointermove", event => {
    if (handle.hasPointerCapture(event.pointerId)) move(Math.round(rowAt(event)));
  });
  handle.addEventListener("keydown", event => {
    const steps = {ArrowUp: -1, ArrowLeft: -1, ArrowDown: 1, ArrowRight: 1, PageUp: -4, PageDown: 4, Home: -state.layers, End: state.layers};
    if (!(event.key in steps)) return;
    playing = null;
    event.preventDefault();
    move(state.K + steps[event.key]);
  });
  canvas.addEventListener("click", event => chooseLayer(Math.floor(rowAt(event))));
  find("words").addEventListener("click", event => {
    const token = event.target.dataset.token;
    if (token !== undefined) look(+token === state.token ? null : +token);
  });
  find("layer").oninput = () => chooseLayer(+find("layer").value);
  for (const name of ["head", "way"]) find(name).onchange = () => { state[name] = find(name).value; draw(); };
  find("play").onclick = play;
  find("tiles").addEventListener("click", event => {
    const patch = event.target.dataset.patch;
    if (patch !== undefined) choosePatch(+patch);
  });
  find("tiles").addEventListener("keydown", event => {
    const side = +find("tiles").dataset.side, steps = {ArrowUp: -side, ArrowDown: side, ArrowLeft: -1, ArrowRight: 1};
    if (event.key in steps) at = at === null ? 0 : within(at + steps[event.key], 0, patches.length - 1);
    else if (event.key === "Enter" && at !== null) choosePatch(at);
    else if (event.key === "Delete" && at !== null) source.away?.(order.visual[at]);
    else return;
    event.preventDefault();
    draw();
    if (at !== null) find("where").textContent = patches[at].dataset.tip.replace("\n", ": ");
  });
  find("tiles").addEventListener("blur", () => { at = null; draw(); });

  function choosePatch(patch) {
    const token = order.visual[patch];
    if (source.away?.(token, true)) return;
    if (source.saysMore) look(token === state.token ? null : token);
  }

  const tip = find("tip");
  document.addEventListener("pointermove", event => {
    const told = event.target.closest?.("[data-tip]");
    tip.hidden = !told;
    if (!told) return;
    tip.textContent = told.dataset.tip;
    tip.style.left = within(event.clientX + 14, 4, innerWidth - tip.offsetWidth - 8) + "px";
    tip.style.top = Math.max(4, event.clientY - tip.offsetHeight - 12) + "px";
  });
  new ResizeObserver(() => state.frame && (drawStack(), drawHandle())).observe(find("stack"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);

  function fromAddress() {
    const said = new URLSearchParams(location.hash.slice(1));
    const number = (name, most) => said.has(name) && Number.isInteger(+said.get(name)) ? within(+said.get(name), 0, most) : null;
    state.K = number("K", state.layers) ?? state.K;
    if (said.has("layer")) {
      state.layer = number("layer", state.layers - 1) ?? 0;
      state.token = number("token", state.words.length - 1) ?? answering();
    }
  }
  addEventListener("hashchange", () => { fromAddress(); refresh(); });
  return {state, open, move, chooseLayer, refresh, play, fromAddress, stop: () => { playing = null; }};
}
