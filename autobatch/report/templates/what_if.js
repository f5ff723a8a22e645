// Sliders that ask other questions, and the curve that moves with them.
function useWhatIf(data, answers) {
  const { plan, curve } = data, cards = answers.known.cards;
  const card = byId("card"), headroom = byId("headroom"), target = byId("target");
  const slide = byId("target-slide"), size = byId("size"), steps = byId("steps");
  const most = Math.max(...cards.flatMap((each) => each.ceilings));
  cards.forEach((each, index) => {
    const option = element("option", "", each.name + ", " + formatBytes(each.capacity));
    option.value = String(index);
    card.append(option);
  });
  size.min = steps.min = "1";
  size.max = String(Math.max(Math.ceil(most * 1.1), 2));
  steps.max = String(Math.max(64, plan.steps * 2));
  slide.min = "0";
  const largest = Math.max(1e6, plan.target);
  slide.max = String(Math.max(16, Math.ceil(Math.log2(plan.target))));
  target.min = String(plan.worldSize);
  target.max = String(largest);
  let isByHand = false;

  function fillHeadrooms() {
    const known = cards[card.value].headrooms;
    headroom.min = "0";
    headroom.max = String(known.length - 1);
    const at = known.indexOf(plan.headroom);
    headroom.value = String(at < 0 ? 0 : at);
  }

  function reset() {
    isByHand = false;
    card.value = "0";
    fillHeadrooms();
    target.value = String(plan.target);
    show();
  }

  function show() {
    const goal = Math.min(Math.max(Math.floor(Number(target.value)) || 0, 0), largest);
    slide.value = String(Math.round(Math.log2(Math.max(goal, 1))));
    byId("target-out").textContent = formatCount(goal);
    slide.setAttribute("aria-valuetext", formatCount(goal) + (goal === 1 ? " sample" : " samples"));
    const at = Number(headroom.value), chosen = cards[card.value];
    const share = Math.round(chosen.headrooms[at] * 1000) / 10 + " %";
    byId("headroom-out").textContent = share;
    headroom.setAttribute("aria-valuetext", share);
    const found = answers.planned(Number(card.value), at, goal);
    if (!isByHand && found.split) {
      size.value = String(found.split.microBatch);
      steps.value = String(found.split.steps);
    }
    showPlanned(found, goal);
    showByHand(answers.byHand(Number(card.value), at, Number(size.value), Number(steps.value)));
    drawCurve(chosen, found);
  }

  function showPlanned(found, goal) {
    const outcome = byId("outcome");
    outcome.replaceChildren(element("p", "faint", "autobatch would plan"));
    if (!found.split) {
      outcome.append(
        element("p", "big", "no equal share for every GPU"),
        element("p", "", counted(goal, "sample") + " cannot be divided over " + counted(plan.worldSize, "GPU") +
          (goal < plan.worldSize ? "." : " at this ceiling of " + formatCount(found.ceiling) + ".")));
      return;
    }
    const split = found.split;
    const sizes = split.uniform ? formatCount(split.microBatch) : formatCount(split.microBatch) + " or " + formatCount(split.size);
    outcome.append(
      element("p", "big", sizes + " × " + formatCount(split.steps) + " × " + formatCount(plan.worldSize) + " = " + formatCount(split.target)),
      element("p", "", "ceiling " + (found.isLeast ? "at least " : "") + formatCount(found.ceiling) + "; " + peakText(found, split.steps) + " reserved of " +
        formatBytes(found.budget) + "; " + percent(found.likelihood) + " likely to fit a real card"));
  }

  // Below a size that is known a peak is on the line of its neighbours, and may be up to the larger one.
  // The window of the plan was executed; other windows of one micro-batch are not those whose peak is known.
  function peakText({ bytes, most, isKnown, isBounded, isPlan }, count) {
    if (isKnown) return (isPlan || count > 1 ? "" : "about ") + formatBytes(bytes);
    const upTo = formatBytes(most);
    return "about " + formatBytes(bytes) + (isBounded && upTo !== formatBytes(bytes) ? ", up to " + upTo : "");
  }

  function showByHand(hand) {
    byId("size-out").textContent = formatCount(Number(size.value));
    byId("steps-out").textContent = formatCount(Number(steps.value));
    const over = hand.most - hand.budget;
    byId("by-hand").replaceChildren(
      element("p", "faint", "By hand"),
      element("p", "big", size.value + " × " + steps.value + " × " + plan.worldSize + " = " + formatCount(hand.batch)),
      element("p", "", peakText(hand, Number(steps.value)) + " reserved: " +
        (over > 0 ? formatBytes(over) + " over the budget" : formatBytes(-over) + " of the budget stay free") +
        "; " + percent(hand.likelihood) + " likely to fit a real card"));
  }

  function drawCurve(chosen, found) {
    if (!byId("curve")) return;
    const usable = chosen.capacity - chosen.context;
    const points = answers.known.sizes.map((each, index) => [each, answers.known.peaks[index]]);
    const widest = Math.max(Number(size.value), found.ceiling, plan.ceiling) * 1.15 + 1;
    const top = Math.max(usable, answers.peak(Number(size.value)).bytes) * 1.08;
    const x = (value) => 1000 * value / widest, y = (value) => 300 * (1 - value / top);
    const path = (line) => "M" + line.map(([n, bytes]) => x(n).toFixed(1) + " " + y(bytes).toFixed(1)).join("L");
    byId("curve-line").setAttribute("d", path(points));
    const ranges = points.map(([n, bytes]) => [n, answers.range(bytes)]);
    byId("curve-band").setAttribute("d", path([
      ...ranges.map(([n, [, high]]) => [n, high]), ...ranges.reverse().map(([n, [low]]) => [n, low]),
    ]) + "Z");
    drawRows(byId("curve-rows"), top);
    byId("curve-columns").replaceChildren(...roundSteps(widest, innerWidth < 640 ? 4 : 8).map((each) => {
      const label = element("span", "", formatCount(each));
      label.style.left = 100 * each / widest + "%";
      return label;
    }));
    const place = (id, n, bytes) => {
      byId(id).style.left = x(n) / 10 + "%";
      byId(id).style.top = y(bytes) / 3 + "%";
    };
    byId("curve-budget").style.top = y(found.budget) / 3 + "%";
    byId("curve-budget").firstElementChild.textContent = "budget " + formatBytes(found.budget);
    byId("curve-capacity").style.top = y(usable) / 3 + "%";
    place("curve-ceiling", found.ceiling, answers.peak(found.ceiling).bytes);
    if (found.split) place("curve-plan", found.split.microBatch, found.peak);
    place("curve-hand", Number(size.value), answers.peak(Number(size.value)).bytes);
    byId("curve-hand").hidden = found.split !== null && Number(size.value) === found.split.microBatch;
    byId("curve-drawing").setAttribute("aria-label", "Reserved memory against the micro-batch on " + chosen.name +
      ": the ceiling is " + found.ceiling + ", the budget " + formatBytes(found.budget));
  }

  card.addEventListener("input", () => { fillHeadrooms(); show(); });
  headroom.addEventListener("input", show);
  target.addEventListener("input", show);
  slide.addEventListener("input", () => { target.value = String(2 ** Number(slide.value)); show(); });
  for (const each of [size, steps]) each.addEventListener("input", () => { isByHand = true; show(); });
  byId("reset").addEventListener("click", reset);
  addEventListener("resize", show);
  reset();
}
