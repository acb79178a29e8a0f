"use strict";
// Draws the curves of one run or several as SVG, as wide as the page is. All text goes through textContent.
(() => {
  const runs = JSON.parse(document.getElementById("data").textContent);
  const CHARTS = [
    { title: "Loss", large: true, lines: [["train/loss", "training"], ["val/loss", "validation"]], smooth: true, log: true },
    { title: "Safety", lines: [["safety/attack_success", "attack success"], ["safety/over_refusal", "over-refusal"]], zero: true },
    { title: "Validation perplexity", lines: [["val/perplexity", ""]], log: true },
    { title: "Learning rate", lines: [["lr", ""]], zero: true },
    { title: "Gradient norm", lines: [["train/grad_norm", ""]], smooth: true, log: true },
    { title: "Throughput", unit: "tokens/s", lines: [["throughput/tokens_per_second", ""]], zero: true, smooth: true },
    { title: "Memory", unit: "GiB", lines: [["memory/rss_gib", "held"], ["memory/peak_gib", "peak"]], zero: true },
    { title: "Model FLOPs utilization", unit: "%", lines: [["throughput/mfu", ""]], zero: true, scale: 100 },
    { title: "Useful share", unit: "% of positions that are not padding", lines: [["throughput/useful_share", ""]], scale: 100, most: 100 },
  ];
  const AXES = [["step", "optimizer step"], ["tokens_seen", "tokens"], ["elapsed", "training time"]];
  const HIDDEN = new Set(["step", "epoch", "time", "elapsed", "tokens_seen", "throughput/steps_per_second",
    "throughput/flops_per_second", "train/nll", "val/nll"]);
  const several = runs.length > 1;
  const state = { axis: "step", log: false, smooth: 0, off: new Set(), at: null };

  const html = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
  const svg = (tag, attributes = {}, ...children) =>
    fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
  function fill(node, attributes, children) {
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    for (const child of children) node.append(child);
    return node;
  }

  // --- numbers as people read them
  function number(value) {
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e15)) return value.toExponential(2).replace("e+", "e");
    for (const [unit, letter] of [[1e12, "T"], [1e9, "G"], [1e6, "M"]]) {
      if (size >= unit) return trim((value / unit).toPrecision(4)) + " " + letter;
    }
    return size >= 1000 ? Math.round(value).toLocaleString("en") : trim(value.toPrecision(4));
  }
  const trim = (text) => (text.includes(".") ? text.replace(/\.?0+$/, "") : text);
  function short(value) {
    const size = Math.abs(value);
    for (const [unit, letter] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
      if (size >= unit) return trim((value / unit).toPrecision(3)) + letter;
    }
    if (size === 0 || size >= 0.01) return trim(value.toPrecision(3));
    const [digits, power] = value.toExponential(1).split("e");
    return `${trim(digits)}e${power}`;
  }
  function clock(seconds) {
    if (seconds < 120) return Math.round(seconds) + " s";
    if (seconds < 7200) return trim((seconds / 60).toPrecision(3)) + " min";
    return trim((seconds / 3600).toPrecision(3)) + " h";
  }
  const place = (value) => (state.axis === "elapsed" ? clock(value) : short(value));

  function ticks(low, high, count) {
    const rough = (high - low) / Math.max(count, 1);
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((m) => m * power).find((m) => m >= rough * 0.999);
    const result = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) result.push(i * step);
    return result;
  }
  function timeTicks(low, high, count) {
    const rough = (high - low) / Math.max(count, 1);
    const steps = [1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 36000, 86400, 172800, 432000];
    const step = steps.find((s) => s >= rough) || Math.ceil(rough / 864000) * 864000;
    const result = [];
    for (let i = Math.ceil(low / step); i * step <= high; i++) result.push(i * step);
    return result;
  }
  function logTicks(low, high) {
    const result = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
      for (const m of [1, 2, 5]) {
        const value = m * 10 ** power;
        if (value >= low && value <= high) result.push(value);
      }
    }
    return result.length > 1 ? result : ticks(low, high, 4);
  }

  // --- series
  function series(chart) {
    const found = [];
    runs.forEach((run, index) => {
      const x = run.columns[state.axis];
      if (!x || state.off.has(index)) return;
      chart.lines.forEach(([name, label], line) => {
        const y = run.columns[name];
        if (!y) return;
        const points = [];
        for (let i = 0; i < y.length; i++) {
          if (y[i] !== null && x[i] !== null) points.push([x[i], y[i] * (chart.scale || 1)]);
        }
        if (!points.length) return;
        // One run: a color a line. Several: a color a run, the second line dashed.
        const color = several ? index % 8 : line % 8;
        found.push({ points, color, label, run: several ? run.name : "", dashed: several && line > 0, name });
      });
    });
    return found;
  }
  function smoothed(points) {
    // The weighted mean of as many neighbours on either side: a falling curve is not shown too late, the ends stay in
    // their places. Weights fall off exponentially.
    const reach = Math.ceil(Math.log(0.01) / Math.log(state.smooth));
    return points.map(([x, y], i) => {
      let total = y, weights = 1, weight = 1;
      for (let d = 1; d <= Math.min(reach, i, points.length - 1 - i); d++) {
        weight *= state.smooth;
        total += weight * (points[i - d][1] + points[i + d][1]);
        weights += 2 * weight;
      }
      return [x, total / weights];
    });
  }
  function extent(values, chart, log) {
    const sorted = values.filter((v) => !log || v > 0).sort((a, b) => a - b);
    let low = sorted[0], high = sorted[sorted.length - 1];
    if (log) return low === high ? [low / 2, high * 2] : [low / 1.05, high * 1.05];
    // A few wild values must not flatten the rest; they leave the picture at its edge.
    const most = sorted[Math.min(sorted.length - 1, Math.floor(sorted.length * 0.99))];
    if (chart.smooth && sorted.length > 50 && high - low > 8 * (most - low)) high = low + 1.5 * (most - low);
    if (chart.zero) low = Math.min(low, 0);
    if (chart.most) return [low - (chart.most - low) * 0.05 - (low === chart.most ? 5 : 0), chart.most];
    if (low === high) { const pad = Math.abs(low) * 0.1 || 1; return [low - (chart.zero && low === 0 ? 0 : pad), high + pad]; }
    const pad = (high - low) * 0.05;
    return [chart.zero && low === 0 ? 0 : low - pad, high + pad];
  }

  // --- one chart
  function draw(card, chart) {
    const lines = series(chart);
    card.hidden = !lines.length;
    card.replaceChildren();
    if (!lines.length) return;
    card.append(heading(chart, lines));
    const width = Math.max(260, card.clientWidth - 28), height = chart.large ? Math.min(340, Math.max(240, width * 0.5)) : 210;
    const log = state.log && Boolean(chart.log);
    const values = lines.flatMap((line) => line.points.map((p) => p[1]));
    const [low, high] = extent(values, chart, log);
    const starts = lines.map((line) => line.points[0][0]), ends = lines.map((line) => line.points.at(-1)[0]);
    let left = Math.min(...starts), right = Math.max(...ends);
    if (left === right) { left -= 1; right += 1; }
    const yTicks = log ? logTicks(low, high) : ticks(low, high, chart.large ? 6 : 4);
    const margin = { left: 12 + 7 * Math.max(...yTicks.map((t) => short(t).length)), right: 14, top: 10, bottom: 24 };
    const X = (x) => margin.left + ((x - left) / (right - left)) * (width - margin.left - margin.right);
    const scaled = log ? (y) => Math.log(y / low) / Math.log(high / low) : (y) => (y - low) / (high - low);
    const Y = (y) => height - margin.bottom - Math.min(1, Math.max(0, scaled(y))) * (height - margin.top - margin.bottom);

    const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": chart.title });
    for (const t of yTicks) {
      picture.append(svg("line", { class: "tick", x1: margin.left, x2: width - margin.right, y1: Y(t), y2: Y(t) }));
      picture.append(svg("text", { x: margin.left - 6, y: Y(t) + 4, "text-anchor": "end" }, short(t)));
    }
    const count = Math.floor(width / 90);
    for (const t of (state.axis === "elapsed" ? timeTicks : ticks)(left, right, count)) {
      if (X(t) > width - margin.right - 8 && t !== right && X(t) > width - 4) continue;
      picture.append(svg("text", { x: X(t), y: height - 6, "text-anchor": "middle" }, place(t)));
    }
    const bottom = height - margin.bottom;
    picture.append(svg("line", { class: "base", x1: margin.left, x2: width - margin.right, y1: bottom, y2: bottom }));
    for (const line of lines) picture.append(...curve(line, chart, X, Y, log));
    card.append(picture);
    hover(card, picture, lines, chart, { X, Y, left, right, width, margin, bottom, log });
  }
  function heading(chart, lines) {
    const title = html("h3", {}, chart.title);
    if (chart.unit) title.append(html("span", {}, chart.unit));
    const labels = new Map(lines.filter((line) => line.label).map((line) => [line.label, line]));
    if (labels.size > 1) {
      for (const [label, line] of labels) {
        const mark = several ? (line.dashed ? "╌ " : "━ ") : "● ";
        title.append(html("b", several ? {} : { class: `key k${line.color}` }, mark + label));
      }
    }
    return title;
  }
  function curve(line, chart, X, Y, log) {
    const path = (points) =>
      points.filter((p) => !log || p[1] > 0).map((p, i) => `${i ? "L" : "M"}${X(p[0]).toFixed(1)} ${Y(p[1]).toFixed(1)}`).join("");
    const kind = `curve k${line.color}${line.dashed ? " dashed" : ""}`;
    const validation = line.name.startsWith("val/");
    const smooth = chart.smooth && !validation && state.smooth > 0 && line.points.length > 10;
    const parts = [];
    if (smooth) parts.push(svg("path", { class: `${kind} faint`, d: path(line.points) }));
    parts.push(svg("path", { class: kind, d: path(smooth ? smoothed(line.points) : line.points) }));
    if (line.points.length === 1 || (validation && line.points.length <= 60)) {
      for (const [x, y] of line.points) {
        if (!log || y > 0) parts.push(svg("circle", { class: `dot k${line.color}`, cx: X(x), cy: Y(y), r: 3 }));
      }
    }
    return parts;
  }

  // --- what is under the pointer
  function nearest(points, x) {
    let low = 0, high = points.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (points[middle][0] < x) low = middle; else high = middle;
    }
    return x - points[low][0] < points[high][0] - x ? points[low] : points[high];
  }
  function hover(card, picture, lines, chart, view) {
    const layer = svg("g");
    const tip = html("div", { class: "tip", hidden: "" });
    picture.append(layer);
    card.append(tip);
    const clear = () => { layer.replaceChildren(); tip.hidden = true; };
    const show = (event) => {
      const box = picture.getBoundingClientRect();
      const share = ((event.clientX - box.left) / box.width * view.width - view.margin.left)
        / (view.width - view.margin.left - view.margin.right);
      if (share < -0.02 || share > 1.02) return clear();
      const x = view.left + share * (view.right - view.left);
      const found = lines.map((line) => ({ line, point: nearest(line.points, x) }));
      const at = found.map((f) => f.point[0]).reduce((a, b) => (Math.abs(a - x) <= Math.abs(b - x) ? a : b));
      layer.replaceChildren(svg("line", { class: "cursor", x1: view.X(at), x2: view.X(at), y1: view.margin.top, y2: view.bottom }));
      const axis = AXES.find((a) => a[0] === state.axis)[1];
      tip.replaceChildren(html("div", { class: "at" }, `${axis} ${state.axis === "elapsed" ? clock(at) : Math.round(at).toLocaleString("en")}`));
      for (const { line, point } of found) {
        if (!view.log || point[1] > 0) {
          layer.append(svg("circle", { class: `here k${line.color}`, cx: view.X(point[0]), cy: view.Y(point[1]), r: 4 }));
        }
        const label = [line.run, line.label].filter(Boolean).join(", ") || chart.title;
        const away = point[0] === at ? "" : ` (at ${place(point[0])})`;
        tip.append(html("div", {}, html("span", { class: `key k${line.color}` }, label), html("span", {}, number(point[1]) + away)));
      }
      tip.hidden = false;
      const here = (view.X(at) / view.width) * box.width, room = card.clientWidth;
      tip.style.top = "44px";
      tip.style.left = `${here + tip.offsetWidth + 34 < room ? here + 26 : Math.max(6, here - tip.offsetWidth - 2)}px`;
    };
    picture.addEventListener("pointermove", show);
    picture.addEventListener("pointerdown", show);
    // A finger that was lifted leaves, too; what it showed stays until it taps elsewhere.
    picture.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") clear(); });
    card.clear = clear;
  }

  // --- the page
  const has = (name) => runs.some((run) => (run.columns[name] || []).some((value) => value !== null));
  const section = document.getElementById("charts");
  const charts = CHARTS.filter((chart) => chart.lines.some(([name]) => has(name)));
  const shown = new Set(CHARTS.flatMap((chart) => chart.lines.map(([name]) => name)));
  const others = [...new Set(runs.flatMap((run) => Object.keys(run.columns)))]
    .filter((name) => !shown.has(name) && !HIDDEN.has(name) && has(name))
    .filter((name) => !/^safety\/.*\//.test(name)).sort();  // parts of a measurement are in the table of safety.csv
  for (const name of others) charts.push({ title: name, lines: [[name, ""]], smooth: name.startsWith("train/"), log: true });

  const cards = charts.map((chart) => [html("div", { class: chart.large ? "chart large" : "chart" }), chart]);
  const redraw = () => cards.forEach(([card, chart]) => draw(card, chart));
  if (!charts.length) {
    section.append(html("p", { class: "note" }, "Nothing was logged yet."));
    return;
  }
  section.append(controls());
  if (several) section.append(legend());
  section.append(html("div", { class: "grid" }, ...cards.map(([card]) => card)));
  redraw();
  addEventListener("pointerdown", (event) => {
    for (const [card] of cards) if (card.clear && !card.contains(event.target)) card.clear();
  });
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; redraw(); } });

  function controls() {
    const axis = html("select", { id: "axis" });
    for (const [name, label] of AXES) if (has(name)) axis.append(html("option", { value: name }, label));
    axis.addEventListener("change", () => { state.axis = axis.value; redraw(); });
    const log = html("input", { type: "checkbox", id: "log" });
    log.addEventListener("change", () => { state.log = log.checked; redraw(); });
    const rows = Math.max(...runs.map((run) => (run.columns["train/loss"] || []).length));
    state.smooth = rows > 150 ? 0.8 : 0;
    const smooth = html("input", { type: "range", id: "smooth", min: 0, max: 0.99, step: 0.01, value: state.smooth });
    smooth.addEventListener("input", () => { state.smooth = Number(smooth.value); redraw(); });
    return html("div", { class: "controls" },
      html("label", { for: "axis" }, "Over", axis),
      html("label", { for: "smooth" }, "Smoothing", smooth),
      html("label", { for: "log" }, log, "Logarithmic"));
  }
  function legend() {
    return html("div", { class: "legend" }, ...runs.map((run, index) => {
      const button = html("button", { class: `run-${index % 8}`, type: "button", "aria-pressed": "true" }, html("i"), run.name);
      button.addEventListener("click", () => {
        if (state.off.has(index)) state.off.delete(index); else state.off.add(index);
        button.setAttribute("aria-pressed", String(!state.off.has(index)));
        redraw();
      });
      return button;
    }));
  }
})();
