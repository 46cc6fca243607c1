// Draws the lanes of the page on a canvas.  All text goes through textContent or fillText.
"use strict";
(function () {
  const values = JSON.parse(document.getElementById("values").textContent);
  const live = document.getElementById("live");
  if (!live || !values.groups) return;

  const START = 0, END = 1, LEAST = 2, MOST = 3, COUNT = 4, NAME = 5;
  const HEAD = 26, TITLE = 26, ROW = 20;
  const canvas = document.getElementById("time");
  const hover = document.getElementById("hover");
  const about = document.getElementById("about");
  const context = canvas.getContext("2d");
  const whole = values.length;
  const rows = []; // titles of groups and lanes, from top to bottom
  let from = 0, until = whole; // what is shown, in ns
  let width = 0, left = 0; // of the canvas, and of the names beside the lanes
  let chosen = null; // {row, index}
  let colours = {};

  for (const group of values.groups) {
    rows.push({ title: group.name + ": " + group.what });
    for (const lane of group.lanes) {
      rows.push({ lane: lane, longest: lane.items.reduce((m, i) => Math.max(m, i[END] - i[START]), 0) });
    }
  }

  // -- words

  function number(n) {
    return n.toLocaleString("en-GB");
  }

  function length(ns) {
    const sign = ns < 0 ? "-" : "";
    ns = Math.abs(ns);
    if (ns < 1e3) return sign + Math.round(ns) + " ns";
    if (ns < 1e5) return sign + short(ns / 1e3) + " us";
    if (ns < 1e9) return sign + short(ns / 1e6) + " ms";
    if (ns < 6e11) return sign + short(ns / 1e9) + " s";
    return sign + short(ns / 6e10) + " min";
  }

  function short(x) {
    return String(Number(x.toPrecision(3)));
  }

  function moment(ns) {
    return (ns / 1e9).toFixed(6) + " s";
  }

  function words(row, item) {
    const least = item[LEAST], most = item[MOST];
    const text = [row.lane.name + ": " + values.names[item[NAME]]];
    if (most > 0) {
      text.push(most - least > most / 10 ? "at least " + length(least) + ", at most " + length(most) : length(most));
    }
    text.push(item[START] === item[END] ? "at " + moment(item[START])
      : "between " + moment(item[START]) + " and " + moment(item[END]));
    if (item[COUNT] > 1) {
      text.push("the longest of " + number(item[COUNT]) + " that began within " + length(row.lane.bin));
    }
    return text.join("; ");
  }

  // -- drawing

  function measure() {
    const scale = window.devicePixelRatio || 1;
    const style = getComputedStyle(document.documentElement);
    for (const name of ["paper", "ink", "soft", "band", "sure", "maybe", "mark", "grid"]) {
      colours[name] = style.getPropertyValue("--" + name).trim();
    }
    width = canvas.clientWidth;
    left = narrow() ? 0 : Math.min(260, Math.round(width * 0.28));
    let y = HEAD;
    for (const row of rows) {
      row.y = y;
      row.high = row.title ? TITLE : narrow() ? 2 * ROW - 4 : ROW;
      y += row.high;
    }
    canvas.height = Math.round((y + 4) * scale);
    canvas.width = Math.round(width * scale);
    canvas.style.height = y + 4 + "px";
    context.setTransform(scale, 0, 0, scale, 0, 0);
    draw();
  }

  function narrow() {
    return width < 620;
  }

  function x(t) {
    return left + (t - from) / (until - from) * (width - left);
  }

  function time(at) {
    return from + (at - left) / (width - left) * (until - from);
  }

  function draw() {
    context.fillStyle = colours.paper;
    context.fillRect(0, 0, width, canvas.height);
    context.textBaseline = "middle";
    ticks();
    for (const row of rows) {
      if (row.title) {
        text(row.title, 0, row.y + TITLE - 10, width, "600 12px system-ui, sans-serif", colours.ink);
      } else {
        lane(row);
      }
    }
  }

  function text(what, at, y, room, font, colour) {
    context.font = font;
    context.fillStyle = colour;
    let shown = what;
    if (context.measureText(shown).width > room) {
      let low = 0, high = shown.length;
      while (low < high) {
        const middle = (low + high + 1) >> 1;
        if (context.measureText(what.slice(0, middle) + "…").width <= room) low = middle;
        else high = middle - 1;
      }
      shown = what.slice(0, low) + "…";
    }
    context.fillText(shown, at, y);
  }

  function ticks() {
    const wanted = (until - from) / Math.max(2, Math.floor((width - left) / 110));
    let step = Math.pow(10, Math.floor(Math.log10(Math.max(1, wanted))));
    step *= wanted > 5 * step ? 10 : wanted > 2 * step ? 5 : wanted > step ? 2 : 1;
    const digits = Math.min(9, Math.max(0, Math.ceil(-Math.log10(step / 1e9))));
    context.lineWidth = 1;
    for (let t = Math.ceil(from / step) * step; t <= until; t += step) {
      const at = Math.round(x(t)) + 0.5;
      context.strokeStyle = colours.grid;
      context.beginPath();
      context.moveTo(at, HEAD - 8);
      context.lineTo(at, canvas.height);
      context.stroke();
      const label = (t / 1e9).toFixed(digits) + " s";
      context.font = "11px system-ui, sans-serif";
      const half = context.measureText(label).width / 2;
      text(label, Math.min(width - 2 * half, Math.max(left, at - half)), 9, 200, context.font, colours.soft);
    }
  }

  function lane(row) {
    const band = narrow() ? row.y + ROW - 4 : row.y;
    const centre = band + ROW / 2;
    context.fillStyle = colours.band;
    context.fillRect(left, band + 2, width - left, ROW - 4);
    const count = number(row.lane.count);
    const font = "12px system-ui, sans-serif";
    const room = (narrow() ? width : left) - 10;
    text(row.lane.name + "  (" + count + ")", 0, narrow() ? row.y + 8 : centre, room, font,
      chosen && chosen.row === row ? colours.mark : colours.ink);
    context.save();
    context.beginPath();
    context.rect(left, row.y, width - left, row.high);
    context.clip();
    let last = -1; // of what is one pixel wide only one a pixel is drawn
    row.lane.items.forEach(function (item, index) {
      if (item[END] < from || item[START] > until) return;
      const begin = x(item[START]), end = x(item[END]);
      const picked = chosen && chosen.row === row && chosen.index === index;
      if (!picked && end - begin < 1.5) {
        const pixel = Math.round(begin);
        if (pixel === last) return;
        last = pixel;
      }
      one(item, begin, end, centre, picked);
    });
    context.restore();
  }

  function one(item, begin, end, centre, picked) {
    const scale = (width - left) / (until - from);
    const sure = item[LEAST] * scale, maybe = item[MOST] * scale;
    if (end - begin > Math.max(3, maybe)) { // it lies somewhere in here
      context.strokeStyle = colours.soft;
      context.lineWidth = 1;
      context.beginPath();
      context.moveTo(begin, centre);
      context.lineTo(end, centre);
      for (const edge of [begin, end]) {
        context.moveTo(edge, centre - 5);
        context.lineTo(edge, centre + 5);
      }
      context.stroke();
    }
    if (maybe > sure + 1) {
      context.globalAlpha = 0.3;
      context.fillStyle = colours.maybe;
      context.fillRect(begin, centre - 4, maybe, 8);
      context.globalAlpha = 1;
      context.strokeStyle = colours.maybe;
      context.lineWidth = 1.5;
      context.strokeRect(begin, centre - 4, maybe, 8);
    }
    context.fillStyle = colours.sure;
    if (item[MOST] > 0) context.fillRect(begin, centre - 6, Math.max(1.5, sure), 12);
    else context.fillRect(end - 0.75, centre - 7, 1.5, 14); // a moment: at the end of when it may have been
    if (picked) {
      context.strokeStyle = colours.mark;
      context.lineWidth = 2;
      context.strokeRect(begin - 3, centre - 9, Math.max(6, end - begin + 6), 18);
    }
  }

  // -- what is under the pointer

  function under(at, y) {
    const row = rows.find((r) => r.lane && y >= r.y && y < r.y + r.high);
    if (!row || at < left) return null;
    let best = null, nearest = 7;
    row.lane.items.forEach(function (item, index) {
      const begin = x(item[START]), end = x(item[END]);
      const off = at < begin ? begin - at : at > end ? at - end : 0;
      if (off < nearest || (off === nearest && off === 0)) {
        nearest = off;
        best = { row: row, index: index };
      }
    });
    return best;
  }

  function tell(found) {
    about.textContent = found ? words(found.row, found.row.lane.items[found.index]) : "";
  }

  // -- moving

  function show(a, b) {
    const span = Math.min(whole, Math.max(100, b - a));
    from = Math.min(Math.max(0, a), whole - span);
    until = from + span;
    draw();
  }

  function zoom(factor, t) {
    show(t - (t - from) * factor, t + (until - t) * factor);
  }

  function choose(row, index) {
    chosen = { row: row, index: index };
    const item = row.lane.items[index];
    if (item[END] < from || item[START] > until) {
      const half = (until - from) / 2, middle = (item[START] + item[END]) / 2;
      show(middle - half, middle + half);
    } else {
      draw();
    }
    tell(chosen);
  }

  function step(by) {
    if (!chosen) return other(1);
    const index = chosen.index + by;
    if (index >= 0 && index < chosen.row.lane.items.length) choose(chosen.row, index);
  }

  function other(by) { // the lane below or above, at about the same time
    let at = chosen ? rows.indexOf(chosen.row) : -1;
    const t = chosen ? chosen.row.lane.items[chosen.index][START] : from;
    do {
      at += by;
      if (at < 0 || at >= rows.length) return;
    } while (!rows[at].lane || !rows[at].lane.items.length);
    const items = rows[at].lane.items;
    let index = items.findIndex((item) => item[START] >= t);
    if (index < 0) index = items.length - 1;
    choose(rows[at], index);
  }

  const actions = {
    in: () => zoom(0.5, (from + until) / 2),
    out: () => zoom(2, (from + until) / 2),
    left: () => show(from - (until - from) / 4, until - (until - from) / 4),
    right: () => show(from + (until - from) / 4, until + (until - from) / 4),
    all: () => show(0, whole),
    n: () => step(1),
    p: () => step(-1),
    down: () => other(1),
    up: () => other(-1),
  };
  const keys = {
    "+": "in", "=": "in", "-": "out", ArrowLeft: "left", ArrowRight: "right", Home: "all", "0": "all",
    n: "n", p: "p", ArrowDown: "down", ArrowUp: "up",
  };

  canvas.addEventListener("keydown", function (event) {
    const name = event.ctrlKey || event.altKey || event.metaKey ? undefined : keys[event.key];
    if (name === undefined) return;
    event.preventDefault();
    actions[name]();
  });
  for (const button of document.querySelectorAll("button[data-do]")) {
    button.addEventListener("click", () => actions[button.dataset.do]());
  }
  canvas.addEventListener("wheel", function (event) {
    if (!event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    zoom(event.deltaY > 0 ? 1.25 : 0.8, time(event.offsetX));
  }, { passive: false });

  let dragged = null;
  canvas.addEventListener("pointerdown", function (event) {
    dragged = { at: event.offsetX, from: from, until: until, moved: false };
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", function (event) {
    if (dragged) {
      const by = (event.offsetX - dragged.at) / (width - left) * (dragged.until - dragged.from);
      if (Math.abs(event.offsetX - dragged.at) > 3) dragged.moved = true;
      if (dragged.moved) show(dragged.from - by, dragged.until - by);
      return;
    }
    const found = under(event.offsetX, event.offsetY);
    hover.hidden = !found;
    if (!found) return;
    hover.textContent = words(found.row, found.row.lane.items[found.index]);
    const room = Math.max(0, width - hover.offsetWidth);
    hover.style.left = Math.min(room, event.offsetX + 12) + "px";
    hover.style.top = canvas.offsetTop + event.offsetY + 16 + "px";
  });
  canvas.addEventListener("pointerup", function (event) {
    const clicked = dragged && !dragged.moved;
    dragged = null;
    const found = clicked ? under(event.offsetX, event.offsetY) : null;
    if (found) choose(found.row, found.index);
  });
  canvas.addEventListener("pointercancel", () => { dragged = null; });
  canvas.addEventListener("pointerleave", () => { hover.hidden = true; });

  live.hidden = false;
  document.getElementById("static").hidden = true;
  window.addEventListener("resize", measure);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", measure);
  measure();
  about.textContent = "Nothing is chosen.";
})();
