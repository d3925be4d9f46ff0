"use strict";
/* The page of a report. Data come as scripts, each of which calls ramp_fast.put(name, value): a page that was opened
   from a disk may load scripts and pictures beside it, but not read files. All text goes into the page as text. */

const ramp_fast = (() => {
  const loaded = new Map();

  function put(name, value) {
    loaded.set(name, value);
  }

  const waiting = new Map();

  /** The value of data/NAME.js, loaded once. */
  function load(name) {
    if (!waiting.has(name)) {
      waiting.set(name, new Promise((resolve, reject) => {
        const script = document.createElement("script");
        script.src = `data/${name}.js`;
        script.onload = () => {
          const value = loaded.get(name);
          loaded.delete(name);
          script.remove();
          value === undefined ? reject(new Error(`data/${name}.js is damaged`)) : resolve(value);
        };
        script.onerror = () => reject(new Error(`data/${name}.js cannot be read: the folder of the report is not whole`));
        document.head.append(script);
      }));
    }
    return waiting.get(name);
  }

  return { put, load };
})();

(() => {
  const PAGE = 48, CLASSES_PAGE = 25, SAMPLE = 12;
  const MISSING = 65535;
  const find = (id) => document.getElementById(id);
  const padded = (number) => String(number).padStart(3, "0");
  const whole = new Intl.NumberFormat("en");
  const percent = (share, digits = 1) => (share === null || Number.isNaN(share) ? "–" : `${(100 * share).toFixed(digits)} %`);
  const fixed = (value, digits = 2) => (value === null || Number.isNaN(value) ? "–" : value.toFixed(digits));

  let summary, gallery;

  /** An element with attributes, text and children; text never becomes markup. */
  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value === undefined || value === false) continue;
      if (name === "class") element.className = value;
      else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children);
    return element;
  }

  /** A name that others gave: its direction of writing does not leak into the text around it. */
  const named = (text) => make("bdi", {}, text);

  function complain(error) {
    find("error").textContent = error.message;
    find("error").hidden = false;
  }

  const className = (k) => (k < 0 ? "not known" : summary.classes[k] ?? `class ${k}`);

  // ---- numbers of the gallery's images -------------------------------------------------------------------------

  const columns = {};
  let rows; // a promise of the columns

  function bytes(text) {
    const binary = atob(text);
    const array = new Uint8Array(binary.length);
    for (let i = 0; i < binary.length; i++) array[i] = binary.charCodeAt(i);
    return new DataView(array.buffer);
  }

  function loadRows() {
    rows ??= (async () => {
      const count = gallery.count, wide = summary.classes.length > 32768;
      for (const name of ["label", "predicted"]) columns[name] = new Int32Array(count);
      for (const name of ["confidence", "labelProbability", "entropy", "inside"]) columns[name] = new Float64Array(count);
      const files = Array.from({ length: Math.ceil(count / gallery.rows) }, (_, k) => ramp_fast.load(`rows-${padded(k)}`));
      (await Promise.all(files)).forEach((file, k) => {
        const start = k * gallery.rows, length = Math.min(gallery.rows, count - start);
        for (const name of Object.keys(columns)) {
          const view = bytes(file[name]), column = columns[name];
          const isClass = name === "label" || name === "predicted";
          for (let i = 0; i < length; i++) {
            if (isClass) column[start + i] = wide ? view.getInt32(4 * i, true) : view.getInt16(2 * i, true);
            else {
              const value = view.getUint16(2 * i, true);
              column[start + i] = value === MISSING ? NaN : value / (MISSING - 1);
            }
          }
        }
      });
    })();
    return rows;
  }

  async function nameOf(row) {
    const part = await ramp_fast.load(`names-${padded(Math.floor(row / gallery.names))}`);
    return part[row % gallery.names];
  }

  async function allNames() {
    const parts = Array.from({ length: Math.ceil(gallery.count / gallery.names) }, (_, k) => ramp_fast.load(`names-${padded(k)}`));
    return (await Promise.all(parts)).flat();
  }

  async function detailOf(row) {
    const part = await ramp_fast.load(`details-${padded(Math.floor(row / gallery.details))}`);
    const [number, top, targets, largest, problem] = part[row % gallery.details];
    return { number, top, targets, largest, problem };
  }

  // ---- pictures ------------------------------------------------------------------------------------------------

  /** Make an element show a picture of a sheet. */
  function paint(element, about, place) {
    const perFile = about.columns * about.rows, file = Math.floor(place / perFile), within = place % perFile;
    const inFile = Math.min(perFile, about.count - file * perFile), rowsInFile = Math.ceil(inFile / about.columns);
    const x = within % about.columns, y = Math.floor(within / about.columns);
    const at = (k, of) => (of > 1 ? `${(100 * k) / (of - 1)}%` : "0");
    element.style.backgroundImage = `url("pictures/report-${about.kind}-${padded(file)}.jpg")`;
    element.style.backgroundSize = `${100 * about.columns}% ${100 * rowsInFile}%`;
    element.style.backgroundPosition = `${at(x, about.columns)} ${at(y, rowsInFile)}`;
    element.classList.toggle("coarse", Math.max(about.width, about.height) < 64);
    return element;
  }

  /** A photograph with a map over it, or one of them. `what` is "overlay", "map" or "photograph". */
  function stack(row, what, large, target = 0) {
    const size = large ? "-large" : "";
    const maps = gallery.sheets[large ? `maps-large-${target}` : "maps"];
    const photographs = gallery.sheets[`photographs${size}`];
    const element = make("span", { class: "stack" });
    element.style.aspectRatio = `${gallery.size[1]} / ${gallery.size[0]}`;
    if (what !== "map" && photographs) element.append(paint(make("span", { class: "photo" }), photographs, row));
    if (what !== "photograph") element.append(paint(make("span", { class: "map" }), maps, row));
    if (what !== "overlay" || !photographs) element.classList.add("alone");
    if (what === "photograph" && !photographs) element.append(make("span", { class: "none" }, "no photograph in this report"));
    return element;
  }

  function verdict(row) {
    const label = columns.label[row];
    if (label < 0) return make("span", { class: "line soft" }, "true class not known");
    if (label === columns.predicted[row]) return make("span", { class: "line right" }, "✓ correct");
    return make("span", { class: "line wrong", title: className(label) }, "✗ is ", named(className(label)));
  }

  // ---- overview ------------------------------------------------------------------------------------------------

  function showOverview() {
    const { counts, accuracy, runs } = summary;
    const figure = (label, value, more = "") => make("div", {}, make("span", {}, label), make("strong", {}, value), make("span", {}, more));
    const figures = [];
    if (accuracy) {
      figures.push(figure("Top-1 accuracy", percent(accuracy.top1 / counts.labelled), `${whole.format(accuracy.top1)} of ${whole.format(counts.labelled)}`));
      if (summary.classes.length > 5) figures.push(figure("Top-5 accuracy", percent(accuracy.top5 / counts.labelled)));
    } else figures.push(figure("Top-1 accuracy", "–", "the source says no classes"));
    const more = [counts.left ? `${whole.format(counts.left)} not done yet` : "", counts.failed ? "" : "none failed"].filter(Boolean).join(", ");
    figures.push(figure("Images with a map", whole.format(counts.done), `of ${whole.format(counts.images)}${more ? `; ${more}` : ""}`));
    figures.push(figure("Failed", whole.format(counts.failed)));
    figures.push(figure("Mean confidence", percent(summary.confidence)));
    figures.push(figure("Mean entropy of maps", fixed(summary.entropy), `nats; ${fixed(summary.mostEntropy)} at most`));
    const seconds = runs.reduce((sum, run) => sum + (run.seconds ?? 0), 0), images = runs.reduce((sum, run) => sum + (run.images ?? 0), 0);
    if (seconds > 0) figures.push(figure("Speed", `${(images / seconds).toFixed(images > 10 * seconds ? 0 : 2)}/s`, `images, over ${runs.length === 1 ? "one run" : `${runs.length} runs`}`));
    find("figures").replaceChildren(...figures);

    const mean = make("span", { class: "stack", role: "img", "aria-label": "Mean of all maps" });
    mean.style.aspectRatio = `${gallery.size[1]} / ${gallery.size[0]}`;
    mean.append(paint(make("span"), summary.means, 0));
    find("mean").replaceChildren(mean);
    find("plan").replaceChildren(...summary.plan.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, named(value))]));

    const header = (...names) => make("thead", {}, make("tr", {}, ...names.map((name) => make("th", { scope: "col" }, name))));
    const table = (head, lines) => make("table", {}, head, make("tbody", {}, ...lines.map((cells) => make("tr", {}, ...cells.map((cell) => make("td", { class: "why" }, cell))))));
    find("runs").replaceChildren(runs.length
      ? table(header("Started (UTC)", "Images", "Failed", "Seconds", "Images per second", "On"), runs.map((run) => [
        (run.started ?? "").replace("T", " ").replace("+00:00", ""), whole.format(run.images ?? 0), whole.format(run.failures ?? 0),
        fixed(run.seconds ?? NaN, 1), fixed(run.images_per_second ?? NaN, 1), named(run.device_name ?? run.device ?? ""),
      ]))
      : make("p", { class: "note" }, "The store says nothing of runs."));
    const failures = summary.failures, left = counts.failed - failures.length;
    find("failures").replaceChildren(failures.length
      ? table(header("Image", "Why"), failures.map(([name, why]) => [named(name), named(why)]))
      : make("p", { class: "note" }, "None."),
    ...(left > 0 ? [make("p", { class: "note" }, `And ${whole.format(left)} more: failures.csv in the store has all.`)] : []));
  }

  // ---- pages of lists ------------------------------------------------------------------------------------------

  /** Previous, next, and a number to type; `change(page)` shows another page. */
  function pager(name, change) {
    const element = document.querySelector(`[data-pager="${name}"]`);
    let page = 0, pages = 1;
    const go = (to) => change(Math.min(Math.max(to, 0), pages - 1));
    const previous = make("button", { type: "button", onclick: () => go(page - 1) }, "← Previous page");
    const next = make("button", { type: "button", onclick: () => go(page + 1) }, "Next page →");
    const input = make("input", { type: "number", min: 1, "aria-label": "Page", onchange: () => go((Number(input.value) || 1) - 1) });
    const of = make("span");
    element.append(previous, make("label", {}, "Page ", input), of, next);
    return {
      show(at, count) {
        [page, pages] = [at, count];
        element.hidden = pages <= 1;
        input.value = page + 1;
        input.max = pages;
        of.textContent = `of ${whole.format(pages)}`;
        previous.disabled = page === 0;
        next.disabled = page === pages - 1;
      },
    };
  }

  // ---- classes -------------------------------------------------------------------------------------------------

  const classes = { sort: 0, down: false, page: 0, pager: null };
  let classHeads;

  function setUpClasses() {
    const { labelledClasses: labelled } = summary;
    find("classes-note").textContent = labelled
      ? "Images by their true class. Mean maps are those of all images of the class, each counting the same, in colours of their own scale."
      : "The source says no classes: images by their predicted class. Mean maps are those of all images of the class, each counting the same, in colours of their own scale.";
    // Values of a line: number, images, correct, mean confidence, mean entropy.
    classHeads = [
      ["Class", (line) => line[0], false],
      ["Images", (line) => line[1], true],
      ...(labelled ? [["Correct", (line) => line[2] / line[1], true]] : []),
      ["Mean confidence", (line) => line[3], true],
      ["Mean entropy", (line) => line[4], true],
    ];
    const cells = classHeads.map(([name, , isNumber], k) => make("th", { scope: "col", class: isNumber ? "number" : "" },
      make("button", { type: "button", onclick: () => {
        classes.down = classes.sort === k ? !classes.down : isNumber;
        [classes.sort, classes.page] = [k, 0];
        showClasses();
      } }, name)));
    document.querySelector("#classes-table thead tr").replaceChildren(make("th", { scope: "col" }, "Mean map"), ...cells);
    classes.pager = pager("classes", (page) => { classes.page = page; showClasses(); });
    find("classes-search").addEventListener("input", () => { classes.page = 0; showClasses(); });
  }

  function showClasses() {
    const wanted = find("classes-search").value.trim();
    const lines = summary.classRows.map((line, k) => ({ line, place: k + 1 })).filter(({ line }) => classMatches(wanted, line[0]));
    const value = classHeads[classes.sort][1], sign = classes.down ? -1 : 1;
    lines.sort((a, b) => compare(value(a.line), value(b.line), sign) || a.place - b.place);
    const pages = Math.max(1, Math.ceil(lines.length / CLASSES_PAGE));
    const shown = lines.slice(classes.page * CLASSES_PAGE, (classes.page + 1) * CLASSES_PAGE);
    document.querySelectorAll("#classes-table thead button").forEach((button, k) => {
      const sorted = k === classes.sort;
      button.parentElement.setAttribute("aria-sort", sorted ? (classes.down ? "descending" : "ascending") : "none");
      button.textContent = classHeads[k][0] + (sorted ? (classes.down ? " ↓" : " ↑") : "");
    });
    document.querySelector("#classes-table tbody").replaceChildren(...shown.map(({ line, place }) => {
      const [k, images, correct, confidence, entropy] = line;
      const picture = make("span", { class: "stack thumb", role: "img", "aria-label": `Mean map of ${className(k)}` }, paint(make("span"), summary.means, place));
      picture.style.aspectRatio = `${gallery.size[1]} / ${gallery.size[0]}`;
      const number = (text) => make("td", { class: "number" }, text);
      return make("tr", {}, make("td", {}, picture),
        make("th", { scope: "row" }, make("button", { type: "button", class: "link", onclick: () => openClass(k) }, named(className(k)), ` (${k})`)),
        number(whole.format(images)),
        ...(summary.labelledClasses ? [number(percent(correct / images))] : []),
        number(percent(confidence)), number(fixed(entropy)));
    }));
    find("classes-count").textContent = `${whole.format(lines.length)} of ${whole.format(summary.classRows.length)} classes`;
    classes.pager.show(classes.page, pages);
  }

  function openClass(k) {
    find("gallery-controls").reset();
    find("class").value = String(k);
    find("which").value = summary.labelledClasses ? "label" : "predicted";
    location.hash = "gallery";
    update();
  }

  /** By number, or by a part of the name. */
  function classMatches(wanted, k) {
    if (!wanted) return true;
    if (/^[0-9]+$/.test(wanted)) return Number(wanted) === k;
    return className(k).toLowerCase().includes(wanted.toLowerCase());
  }

  /** What is missing comes last in either direction. */
  function compare(a, b, sign) {
    const missing = (value) => value === null || Number.isNaN(value);
    if (missing(a) || missing(b)) return Number(missing(a)) - Number(missing(b));
    return a < b ? -sign : a > b ? sign : 0;
  }

  // ---- gallery -------------------------------------------------------------------------------------------------

  const SORTS = {
    order: ["order of the data set", (row) => row],
    confidence: ["confidence", (row) => columns.confidence[row]],
    error: ["error", (row) => 1 - columns.labelProbability[row]],
    inside: ["share of relevance inside the box", (row) => columns.inside[row]],
    entropy: ["entropy of the map", (row) => columns.entropy[row]],
    random: ["chance", null],
  };

  const state = { rows: [], page: 0, focus: 0, pager: null, ticket: 0 };

  function setUpGallery() {
    const { count } = gallery, all = summary.counts.done;
    const parts = [count < all
      ? `A random sample of ${whole.format(count)} of ${whole.format(all)} images (seed ${gallery.seed}); the numbers of the overview and of the classes are those of all. ramp-fast report --images ${all} shows them all.`
      : `All ${whole.format(all)} images that have a map.`];
    if (gallery.problem) parts.push(gallery.problem);
    find("gallery-note").replaceChildren(named(parts.join(" ")));
    find("sort").replaceChildren(...Object.entries(SORTS)
      .filter(([name]) => (name !== "inside" || gallery.regions) && (name !== "error" || summary.counts.labelled))
      .map(([name, [text]]) => make("option", { value: name }, text)));
    if (!gallery.photographs) for (const element of [find("picture").closest("label"), ...document.querySelectorAll(".mix")]) element.hidden = true;
    const order = find("order");
    const before = (name) => ["order", "random"].includes(name);
    find("sort").addEventListener("change", () => { order.disabled = before(find("sort").value); });
    order.disabled = true;
    if (!summary.counts.labelled) for (const id of ["outcome", "which"]) find(id).closest("label").hidden = true;
    const unique = [...new Set(summary.classRows.map(([k]) => className(k)))];
    find("class-names").append(...unique.map((name) => make("option", { value: name })));
    state.pager = pager("gallery", (page) => showPage(page));
    const form = find("gallery-controls");
    form.addEventListener("input", (event) => (event.target.id === "picture" ? showPage(state.page) : update()));
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("reset", () => setTimeout(() => { order.disabled = true; update(); }));
    find("cells").addEventListener("keydown", moveInGallery);
    find("cells").addEventListener("focusin", (event) => {
      const place = Number(event.target.dataset.place);
      if (!Number.isNaN(place)) setFocus(place, false);
    });
  }

  /** Filter and sort, and show the first page. */
  async function update() {
    const ticket = ++state.ticket;
    await loadRows();
    const wanted = find("class").value.trim(), which = find("which").value, outcome = find("outcome").value;
    const name = find("name").value.trim().toLowerCase();
    const names = name ? await allNames() : null;
    if (ticket !== state.ticket) return; // typed on since
    const exact = wanted && summary.classes.some((text) => text === wanted);
    const matches = summary.classes.map((text, k) => (exact ? text === wanted : classMatches(wanted, k)));
    const found = [];
    for (let row = 0; row < gallery.count; row++) {
      const label = columns.label[row], predicted = columns.predicted[row];
      const ofClass = !wanted || (which !== "predicted" && label >= 0 && matches[label]) || (which !== "label" && matches[predicted]);
      const ofOutcome = outcome === "all" || (label >= 0 && (label === predicted) === (outcome === "right"));
      if (ofClass && ofOutcome && (!names || names[row].toLowerCase().includes(name))) found.push(row);
    }
    const sort = find("sort").value, key = SORTS[sort][1], sign = find("order").value === "down" ? -1 : 1;
    if (sort === "random") shuffle(found, 1);
    else if (sort !== "order") {
      const keys = new Float64Array(gallery.count);
      for (const row of found) keys[row] = key(row);
      found.sort((a, b) => compare(keys[a], keys[b], sign) || a - b);
    }
    state.rows = found;
    find("gallery-count").textContent = found.length
      ? `${whole.format(found.length)} of ${whole.format(gallery.count)} images`
      : "No image is like that.";
    showPage(0);
  }

  function showPage(page, focus = null) {
    const pages = Math.max(1, Math.ceil(state.rows.length / PAGE));
    [state.page, state.focus] = [page, focus ?? 0];
    const shown = state.rows.slice(page * PAGE, (page + 1) * PAGE), what = find("picture").value;
    find("cells").replaceChildren(...shown.map((row, place) => make("li", {}, cell(row, what, false, { "data-place": place, tabindex: -1 }))));
    state.pager.show(page, pages);
    setFocus(state.focus, focus !== null);
  }

  /** A button that opens an image. */
  function cell(row, what, large, attributes = {}, secret = false) {
    const name = make("bdi", { class: "name" }, "…");
    const predicted = className(columns.predicted[row]);
    const extra = extraOf(row);
    const lines = secret ? [] : [
      make("span", { class: "line", title: predicted }, named(predicted)),
      make("span", { class: "line soft" }, percent(columns.confidence[row]), ...(extra ? [` · ${extra}`] : [])),
      verdict(row),
    ];
    const button = make("button", { type: "button", class: "cell", "data-row": row, ...attributes, onclick: () => open(row, secret ? [row] : null) },
      stack(row, what, large), make("span", { class: "text" }, name, ...lines));
    nameOf(row).then((text) => { name.textContent = text; name.title = text; }, complain);
    return button;
  }

  /** The number that the gallery is sorted by, if the cell does not have it anyway. */
  function extraOf(row) {
    const sort = find("sort").value;
    if (sort === "error") return Number.isNaN(columns.labelProbability[row]) ? "" : `error ${percent(1 - columns.labelProbability[row])}`;
    if (sort === "entropy") return `entropy ${fixed(columns.entropy[row] * summary.mostEntropy)}`;
    if (sort === "inside") return `inside ${percent(columns.inside[row])}`;
    return "";
  }

  function setFocus(place, move) {
    const buttons = find("cells").querySelectorAll(".cell");
    if (!buttons.length) return;
    buttons[state.focus]?.setAttribute("tabindex", -1);
    state.focus = Math.min(Math.max(place, 0), buttons.length - 1);
    buttons[state.focus].setAttribute("tabindex", 0);
    if (move) buttons[state.focus].focus();
  }

  function moveInGallery(event) {
    const buttons = [...find("cells").querySelectorAll(".cell")];
    if (!buttons.length || event.altKey || event.ctrlKey || event.metaKey) return;
    const top = buttons[0].getBoundingClientRect().top;
    const across = Math.max(1, buttons.filter((button) => button.getBoundingClientRect().top === top).length);
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -across, ArrowDown: across };
    const last = Math.ceil(state.rows.length / PAGE) - 1;
    if (event.key in steps) {
      const to = state.focus + steps[event.key];
      if (to >= 0 && to < buttons.length) setFocus(to, true);
      else if (to < 0 && state.page > 0) showPage(state.page - 1, PAGE + to);
      else if (to >= buttons.length && state.page < last) showPage(state.page + 1, to - buttons.length);
    } else if (event.key === "Home") setFocus(0, true);
    else if (event.key === "End") setFocus(buttons.length - 1, true);
    else if (event.key === "PageDown" && state.page < last) showPage(state.page + 1, state.focus);
    else if (event.key === "PageUp" && state.page > 0) showPage(state.page - 1, state.focus);
    else return;
    event.preventDefault();
  }

  // ---- random sample -------------------------------------------------------------------------------------------

  /** mulberry32, a small generator of numbers in [0, 1). */
  function generator(seed) {
    let state_ = seed >>> 0;
    return () => {
      state_ = (state_ + 0x6d2b79f5) >>> 0;
      let t = state_;
      t = Math.imul(t ^ (t >>> 15), t | 1);
      t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
      return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
    };
  }

  /** Bring the first `most` places into a random order, as drawn from all. */
  function shuffle(list, seed, most = list.length) {
    const draw = generator(seed);
    for (let i = 0; i < Math.min(most, list.length - 1); i++) {
      const k = i + Math.floor(draw() * (list.length - i));
      [list[i], list[k]] = [list[k], list[i]];
    }
    return list;
  }

  function setUpSample() {
    find("sample-controls").addEventListener("submit", (event) => {
      event.preventDefault();
      find("sample-number").value = ((Number(find("sample-number").value) || 0) + 1) % 1e9;
      showSample();
    });
    find("sample-number").addEventListener("input", showSample);
    find("sample-hide").addEventListener("change", showSample);
  }

  async function showSample() {
    await loadRows();
    const all = Array.from({ length: gallery.count }, (_, row) => row);
    const drawn = shuffle(all, Number(find("sample-number").value) || 0, SAMPLE).slice(0, SAMPLE);
    const secret = find("sample-hide").checked;
    find("sample-cells").replaceChildren(...drawn.map((row) => make("li", {}, cell(row, "overlay", true, {}, secret))));
  }

  // ---- one image -----------------------------------------------------------------------------------------------

  let shown = null, order = [], opener = null;

  async function open(row, among = null) {
    order = among ?? (current === "sample" ? [...find("sample-cells").querySelectorAll(".cell")].map((b) => Number(b.dataset.row)) : state.rows);
    opener ??= document.activeElement;
    try {
      await showImage(row);
    } catch (error) {
      complain(error);
      return;
    }
    if (!find("image").open) {
      find("image").showModal();
      find("close").focus();
    }
  }

  async function showImage(row) {
    await loadRows();
    shown = row;
    const [name, detail] = await Promise.all([nameOf(row), detailOf(row)]);
    if (shown !== row) return; // gone on since
    find("image-name").replaceChildren(named(name));
    const place = order.indexOf(row);
    find("image-place").textContent = place < 0 ? "" : `${whole.format(place + 1)} of ${whole.format(order.length)}`;
    find("previous").disabled = place <= 0;
    find("next").disabled = place < 0 || place === order.length - 1;

    const label = columns.label[row], predicted = columns.predicted[row];
    const right = label >= 0 && label === predicted;
    find("image-verdict").replaceChildren(
      "Predicted ", make("strong", {}, named(className(predicted))), ` (${percent(columns.confidence[row])})`,
      ...(label < 0 ? ["; the true class is not known"]
        : right ? [", ", make("strong", { class: "right" }, "✓ correct")]
          : [", ", make("strong", { class: "wrong" }, "✗ wrong"), ": it is ", make("strong", {}, named(className(label)))]));

    const figure = (picture, text, ...more) => {
      picture.setAttribute("role", "img");
      picture.setAttribute("aria-label", text);
      return make("figure", {}, picture, make("figcaption", {}, text, ...more));
    };
    const pictures = [];
    const overlaid = gallery.photographs && !detail.problem;
    if (overlaid) pictures.push(figure(stack(row, "photograph", true), "What the model saw"));
    const note = detail.problem ? `The photograph cannot be shown: ${detail.problem}` : overlaid ? "" : gallery.problem;
    find("image-note").replaceChildren(named(note));
    find("image-note").hidden = !note;
    find("image-controls").hidden = !overlaid;
    gallery.targets.forEach((target, k) => {
      const why = target === "predicted" ? "predicted class" : target === "label" ? "true class" : target;
      pictures.push(figure(stack(row, overlaid ? "overlay" : "map", true, k), `Map of the ${why}: ${className(detail.targets[k])}`));
    });
    find("image-pictures").replaceChildren(...pictures);

    document.querySelector("#image-top tbody").replaceChildren(...detail.top.map(([k, probability]) => {
      const bar = make("span");
      bar.style.width = `${100 * probability}%`;
      const marks = [k === label ? "true" : "", detail.targets.includes(k) ? "explained" : ""].filter(Boolean).join(", ");
      return make("tr", {}, make("th", { scope: "row" }, named(className(k)), marks ? ` (${marks})` : ""),
        make("td", { class: "number" }, percent(probability, 2)),
        make("td", { "aria-hidden": "true" }, make("span", { class: "probability" }, bar)));
    }));
    const facts = [
      ["Number in the store", whole.format(detail.number)],
      ...(label < 0 ? [] : [["Probability of the true class", percent(columns.labelProbability[row], 2)]]),
      ["Entropy of the map", `${fixed(columns.entropy[row] * summary.mostEntropy)} nats (${fixed(summary.mostEntropy)} at most)`],
      ...(gallery.regions ? [["Positive relevance inside the box", percent(columns.inside[row])]] : []),
      ["Largest relevance", detail.largest.map((value) => value.toPrecision(3)).join(", ")],
    ];
    find("image-facts").replaceChildren(...facts.flatMap(([term, value]) => [make("dt", {}, term), make("dd", {}, value)]));
  }

  function step(by) {
    const place = order.indexOf(shown) + by;
    if (place >= 0 && place < order.length) showImage(order[place]).catch(complain);
  }

  function closed() {
    const place = state.rows.indexOf(shown);
    if (current === "gallery" && place >= 0) showPage(Math.floor(place / PAGE), place % PAGE);
    else opener?.focus();
    opener = shown = null;
  }

  /** From 0, the photograph alone, to 100, the map alone; in the middle both are there in full. */
  function setOpacity(value) {
    const clipped = Math.min(100, Math.max(0, value)), style = document.documentElement.style;
    style.setProperty("--opacity", Math.min(1, clipped / 50));
    style.setProperty("--photograph", Math.min(1, 2 - clipped / 50));
    document.querySelectorAll(".opacity").forEach((input) => { input.value = clipped; });
  }

  function setUpImage() {
    const dialog = find("image");
    find("previous").addEventListener("click", () => step(-1));
    find("next").addEventListener("click", () => step(1));
    find("close").addEventListener("click", () => dialog.close());
    const colour = find("colour");
    colour.addEventListener("change", () => document.documentElement.classList.toggle("in-colour", colour.checked));
    dialog.addEventListener("close", closed);
    dialog.addEventListener("keydown", (event) => {
      if (event.target.type === "range" && event.key.startsWith("Arrow")) return; // the slider's own
      const opacity = Number(document.querySelector(".opacity").value);
      if (event.key === "ArrowLeft") step(-1);
      else if (event.key === "ArrowRight") step(1);
      else if (event.key === "+" || event.key === "=") setOpacity(opacity + 10);
      else if (event.key === "-") setOpacity(opacity - 10);
      else return;
      event.preventDefault();
    });
    document.querySelectorAll(".opacity").forEach((input) => input.addEventListener("input", () => setOpacity(Number(input.value))));
    setOpacity(75);
  }

  // ---- views ---------------------------------------------------------------------------------------------------

  const VIEWS = ["overview", "classes", "gallery", "sample"];
  let current = null;
  const started = new Set();

  function show() {
    const name = location.hash.slice(1);
    if (name === "main") return; // the link that skips the header
    current = VIEWS.includes(name) ? name : VIEWS[0];
    for (const view of VIEWS) find(`view-${view}`).hidden = view !== current;
    document.querySelectorAll("nav a").forEach((link) => {
      if (link.hash === `#${current}`) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    });
    if (started.has(current)) return;
    started.add(current);
    if (current === "classes") showClasses();
    else if (current === "gallery") update().catch(complain);
    else if (current === "sample") showSample().catch(complain);
  }

  function onKey(event) {
    if (find("image").open || event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.target.closest("input, select, textarea")) return;
    const view = VIEWS[Number(event.key) - 1];
    if (view) location.hash = view;
    else if (event.key === "/") {
      if (current !== "classes") location.hash = "gallery";
      setTimeout(() => find(current === "classes" ? "classes-search" : "class").focus());
      event.preventDefault();
    }
  }

  async function start() {
    summary = await ramp_fast.load("summary");
    gallery = summary.gallery;
    document.title = `${summary.title} – relevance maps`;
    find("title").replaceChildren(named(summary.title));
    showOverview();
    setUpClasses();
    setUpGallery();
    setUpSample();
    setUpImage();
    window.addEventListener("hashchange", show);
    document.addEventListener("keydown", onKey);
    show();
  }

  document.readyState === "loading" ? document.addEventListener("DOMContentLoaded", () => start().catch(complain)) : start().catch(complain);
})();
