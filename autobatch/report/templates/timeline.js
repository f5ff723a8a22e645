// The timeline under the pointer and the keyboard: an instant, what happens there, and a closer look.
function useTimeline(history, icicle) {
  const plot = byId("plot"), readout = byId("readout"), ribbon = byId("ribbon"), layers = byId("layers");
  let from = history.first, to = history.last, at = history.peak, dragged = null;
  const cursor = element("span", "vline"), cursorText = element("b"), selection = element("span", "select");
  cursor.append(cursorText);
  selection.hidden = true;
  plot.append(cursor, selection);
  plot.tabIndex = 0;
  plot.setAttribute("role", "slider");
  plot.setAttribute("aria-label", byId("timeline-drawing").getAttribute("aria-label"));
  plot.setAttribute("aria-describedby", "timeline-help");
  plot.setAttribute("aria-valuemin", String(history.first));
  plot.setAttribute("aria-valuemax", String(history.last));

  const share = (event) => (event - from) / Math.max(to - from, 1);

  function draw() {
    const columns = Math.max(200, Math.min(900, Math.round(plot.clientWidth)));
    const points = history.pointsIn(from, to);
    // of all that falls into a column the highest is drawn, so that a needle is never lost
    const kept = new Map();
    for (const point of points) {
      const column = Math.floor(share(point.event) * columns);
      const other = kept.get(column);
      if (!other || point.allocated > other.allocated) kept.set(column, point);
    }
    const drawn = [...kept].sort((one, other) => one[0] - other[0]);
    const top = history.top * 1.06, x = (column) => 1000 * column / columns, y = (size) => 300 * (1 - size / top);
    const sums = drawn.map(() => 0);
    const paths = history.names.map((name, category) => {
      let path = "";
      drawn.forEach(([column, point], index) => {
        sums[index] += point.categories[category];
        path += (index ? "H" : "M") + x(column).toFixed(1) + (index ? "V" : " ") + y(sums[index]).toFixed(1);
      });
      return [name, path + "H1000V300H0Z"];
    }).reverse();
    byId("areas").replaceChildren(...paths.map(([name, path]) => {
      const area = document.createElementNS("http://www.w3.org/2000/svg", "path");
      area.setAttribute("class", CATEGORY_CLASSES[name] || "c-other");
      area.setAttribute("d", path);
      return area;
    }));
    byId("reserved").setAttribute("d", drawn.map(([column, point], index) =>
      (index ? "H" : "M") + x(column).toFixed(1) + (index ? "V" : " ") + y(point.reserved).toFixed(1)).join("") + "H1000");
    drawRows(byId("plot-rows"), top);
    const peak = byId("peak-line"), atPeak = share(history.peak);
    peak.hidden = atPeak < 0 || atPeak > 1;
    peak.style.left = 100 * atPeak + "%";
    drawRibbon();
    drawLayers();
    point(at, false);
  }

  function drawRibbon() {
    const ends = [...history.marks.slice(1).map((mark) => mark[0]), history.last];
    ribbon.replaceChildren(...history.marks.flatMap(([start, phase, window, microBatch], index) => {
      const left = Math.max(share(start), 0), right = Math.min(share(ends[index]), 1);
      if (right <= left) return [];
      const text = phase + " " + (window + 1) + (WITHOUT_MICRO_BATCH.includes(phase) ? "" : "." + (microBatch + 1));
      const span = element("span", PHASES.includes(phase) ? phase : "");
      Object.assign(span.dataset, { short: SHORT[phase] || "", name: phase, long: text });
      span.style.left = 100 * left + "%";
      span.style.width = 100 * (right - left) + "%";
      span.title = phaseText(history.marks[index]);
      return [span];
    }));
  }

  // Names of the layers that allocate, as deep as there is room for.
  function drawLayers() {
    layers.replaceChildren();
    if (!history.lives) return;
    const { start, holder, holders, modules } = history.lives, width = plot.clientWidth;
    const seen = [];
    start.forEach((event, block) => {
      const module = modules[holders[holder[block]][0]];
      if (event >= from && event <= to && module && module + "." !== history.stem) seen.push([event, module.split(".")]);
    });
    for (let depth = 6; depth > 0; depth -= 1) {
      const runs = [];
      for (const [event, parts] of seen) {
        const name = parts.slice(0, depth).join(".");
        if (runs.length && runs.at(-1).name === name) runs.at(-1).end = event;
        else runs.push({ name, start: event, end: event });
      }
      if (runs.length > width / 2 && depth > 1) continue;
      for (const cluster of clustered(runs, width)) {
        const { first, last, start, end } = cluster;
        const span = element("span", "", first === last ? tail(first) : tail(first) + " … " + tail(last));
        span.style.left = 100 * share(start) + "%";
        span.style.width = 100 * (share(end) - share(start)) + "%";
        span.title = first === last ? first : first + " to " + last;
        layers.append(span);
      }
      return;
    }
  }

  const tail = (name) => (name.startsWith(history.stem) ? name.slice(history.stem.length) : name).split(".").slice(-2).join(".");

  // Runs together until there is room for their names, but none over the end of a phase.
  function clustered(runs, width) {
    const clusters = [];
    for (const { name, start, end } of runs) {
      const open = clusters.at(-1);
      const isRoomy = open && (share(open.end) - share(open.start)) * width > (open.first === open.last ? 60 : 110);
      if (open && !isRoomy && history.phaseAt(open.start) === history.phaseAt(start)) {
        open.last = name;
        open.end = Math.max(end, open.end);
      } else {
        if (open) open.end = start;
        clusters.push({ first: name, last: name, start, end });
      }
    }
    return clusters.filter(({ start, end }) => (share(end) - share(start)) * width > 28);
  }

  function line(parts) {
    const made = element("p");
    parts.filter(Boolean).forEach((part) => made.append(...(Array.isArray(part) ? [element("b", "", part[0])] : [part])));
    return made;
  }

  // Move the cursor to an event, and say what happens there.
  function point(event, tells = true) {
    at = Math.min(Math.max(Math.round(event), history.first), history.last);
    const left = share(at);
    cursor.hidden = left < 0 || left > 1;
    cursor.style.left = 100 * left + "%";
    cursorText.style.left = left > 0.5 ? "" : ".3rem";
    cursorText.style.right = left > 0.5 ? ".3rem" : "";
    const points = history.pointsIn(at, at), here = points[0] || history.sampleAt(at);
    cursorText.textContent = formatBytes(here.allocated);
    // the peak has its own label
    cursorText.hidden = Math.abs(left - share(history.peak)) * plot.clientWidth < 150;
    const phase = history.phaseAt(at), block = history.blockAt(at);
    const when = phase ? phaseText(phase) : "";
    const most = here.categories.map((size, index) => [history.names[index], size]).filter(([, size]) => size > 0)
      .sort((one, other) => other[1] - one[1]);
    const lines = [
      line([["Event " + formatCount(at)], " of " + formatCount(history.last) + (when ? ": " + when : "") + (at === history.peak ? ", the peak" : "")]),
      line([[formatBytes(here.allocated)], " allocated, " + formatBytes(here.reserved) + " reserved: " +
        most.slice(0, 4).map(([name, size]) => name + " " + formatBytes(size)).join(", ")]),
    ];
    if (block) {
      lines.push(line([
        block.isHere ? "Allocates " : "Last large block: ", [formatBytes(block.size)], " " + block.tensor + " (" + block.category + ")",
        block.op ? " by " : "", block.op ? [block.op] : "", block.module ? " in " : "", block.module ? [block.module] : "",
        block.where ? " at " + block.where : "", ".",
      ]));
    }
    readout.replaceChildren(...lines);
    plot.setAttribute("aria-valuenow", String(at));
    plot.setAttribute("aria-valuetext", lines.map((each) => each.textContent).join(". "));
    if (tells && icicle) icicle.show(at);
  }

  function zoom(start, end) {
    const least = Math.min(20, history.last - history.first);
    const middle = (start + end) / 2, length = Math.min(Math.max(end - start, least), history.last - history.first);
    from = Math.round(Math.min(Math.max(middle - length / 2, history.first), history.last - length));
    to = Math.round(from + length);
    draw();
  }

  const nearby = (factor) => zoom(at - (at - from) * factor, at + (to - at) * factor);
  const panned = (direction) => zoom(from + direction * (to - from) / 3, to + direction * (to - from) / 3);
  const around = () => { const half = (history.last - history.first) / 60; zoom(history.peak - half, history.peak + half); point(history.peak); };
  const actions = {
    in: () => nearby(1 / 3), out: () => nearby(3), left: () => panned(-1), right: () => panned(1),
    peak: around, all: () => zoom(history.first, history.last),
  };
  for (const button of document.querySelectorAll("[data-do]")) button.addEventListener("click", actions[button.dataset.do]);

  const eventAt = (pointer) => {
    const box = plot.getBoundingClientRect();
    return from + Math.min(Math.max((pointer.clientX - box.left) / box.width, 0), 1) * (to - from);
  };
  // within a pixel or two of the peak, the peak is meant: it may be a needle
  const snapped = (event) => Math.abs(share(event) - share(history.peak)) * plot.clientWidth < 3 ? history.peak : event;
  plot.addEventListener("pointermove", (pointer) => {
    if (dragged !== null && pointer.pointerType === "mouse") {
      const [start, end] = [share(dragged), share(eventAt(pointer))].sort((one, other) => one - other);
      selection.hidden = (end - start) * plot.clientWidth < 6;
      selection.style.left = 100 * start + "%";
      selection.style.width = 100 * (end - start) + "%";
    } else if (pointer.pointerType === "mouse") point(snapped(eventAt(pointer)), false);
  });
  plot.addEventListener("pointerdown", (pointer) => { if (pointer.button === 0) dragged = eventAt(pointer); });
  addEventListener("pointerup", (pointer) => {
    if (dragged === null) return;
    const [start, end] = [dragged, eventAt(pointer)].sort((one, other) => one - other);
    dragged = null;
    selection.hidden = true;
    if ((share(end) - share(start)) * plot.clientWidth > 6 && pointer.pointerType === "mouse") zoom(start, end);
    else point(snapped(end));
  });
  addEventListener("pointercancel", () => { dragged = null; selection.hidden = true; });
  plot.addEventListener("dblclick", actions.all);
  plot.addEventListener("wheel", (wheel) => {
    if (!wheel.ctrlKey && !wheel.metaKey) return;
    wheel.preventDefault();
    const middle = eventAt(wheel), factor = wheel.deltaY > 0 ? 1.4 : 1 / 1.4;
    zoom(middle - (middle - from) * factor, middle + (to - middle) * factor);
  }, { passive: false });
  plot.addEventListener("keydown", (key) => {
    const stride = Math.max(1, Math.round((to - from) / (key.shiftKey ? 10 : 100)));
    const moves = {
      ArrowLeft: () => point(at - (key.ctrlKey ? 1 : stride)), ArrowRight: () => point(at + (key.ctrlKey ? 1 : stride)),
      ArrowDown: () => point(at - (key.ctrlKey ? 1 : stride)), ArrowUp: () => point(at + (key.ctrlKey ? 1 : stride)),
      Home: () => point(history.first), End: () => point(history.last), PageDown: () => panned(-1), PageUp: () => panned(1),
      "+": actions.in, "=": actions.in, "-": actions.out, "0": actions.all, p: around, P: around,
    };
    const act = moves[key.key];
    if (!act) return;
    key.preventDefault();
    act();
    if (share(at) < 0 || share(at) > 1) zoom(at - (to - from) / 2, at + (to - from) / 2);
  });
  addEventListener("resize", draw);
  draw();
}
