// What is alive at each instant: the samples of the timeline, and between them the largest blocks.
function historyOf(data) {
  const { timeline, lives, plan } = data;
  const names = [...timeline.categories];
  const rounding = timeline.allocated.map((all, index) =>
    Math.max(0, all - names.reduce((sum, _, category) => sum + timeline.bytes[category][index], 0)));
  if (!names.includes("rounding")) names.push("rounding");
  const bytes = [...timeline.bytes, rounding].slice(0, names.length);
  const last = Math.max(lives ? lives.events - 1 : 0, timeline.events.at(-1), timeline.events[0] + 1);

  // the last place whose value is at most the one that is looked for
  function placeOf(sorted, value) {
    let low = 0, high = sorted.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (sorted[middle] <= value) low = middle + 1; else high = middle;
    }
    return low - 1;
  }

  function aliveAt(event) {
    const alive = [];
    for (let block = 0; lives && block < lives.start.length && lives.start[block] <= event; block += 1) {
      if (lives.end[block] > event) alive.push(block);
    }
    return alive;
  }

  function sampleAt(event) {
    const place = Math.max(0, placeOf(timeline.events, event));
    return {
      event, place, allocated: timeline.allocated[place], reserved: timeline.reserved[place],
      categories: bytes.map((each) => each[place]),
    };
  }

  // Points at every event of a stretch at which a large block comes or goes, and at every sample.
  function pointsIn(from, to) {
    if (!lives) {
      return timeline.events.filter((event) => event >= from && event <= to).map(sampleAt);
    }
    const changes = [];
    lives.start.forEach((start, block) => {
      if (start > from && start <= to) changes.push([start, block, 1]);
      if (lives.end[block] > from && lives.end[block] <= to) changes.push([lives.end[block], block, -1]);
    });
    changes.sort((one, other) => one[0] - other[0]);
    const places = lives.holders.map((holder) => names.indexOf(lives.categories[holder[2]]));
    const large = names.map(() => 0);
    for (const block of aliveAt(from)) add(block, 1);
    function add(block, sign) {
      const place = places[lives.holder[block]];
      if (place >= 0) large[place] += sign * lives.size[block];
    }
    const events = [...new Set([from, ...changes.map(([event]) => event),
      ...timeline.events.filter((event) => event > from && event <= to)])].sort((one, other) => one - other);
    let next = 0, rest = null, restPlace = -1;
    // what is left out of the lives is known at samples, and taken to stay until the next one
    const rests = timeline.events.map(() => null);
    const points = [];
    for (const event of events) {
      while (next < changes.length && changes[next][0] <= event) { add(changes[next][1], changes[next][2]); next += 1; }
      const sample = sampleAt(event);
      if (sample.place !== restPlace) {
        restPlace = sample.place;
        rest = rests[restPlace] ??= restAt(restPlace, places);
      }
      const categories = large.map((size, index) => Math.max(0, size + rest[index]));
      const exact = timeline.events[sample.place] === event;
      const allocated = exact ? sample.allocated : categories.reduce((sum, size) => sum + size, 0);
      // what is allocated is reserved: the allocator has asked for more since the sample
      const grown = allocated > sample.reserved ? timeline.reserved[sample.place + 1] ?? 0 : 0;
      points.push({ event, categories, allocated, reserved: Math.max(sample.reserved, grown, allocated) });
    }
    return points;
  }

  function restAt(place, places) {
    const large = names.map(() => 0);
    for (const block of aliveAt(timeline.events[place])) {
      const index = places[lives.holder[block]];
      if (index >= 0) large[index] += lives.size[block];
    }
    return bytes.map((each, index) => each[place] - large[index]);
  }

  function phaseAt(event) {
    const place = placeOf(timeline.marks.map((mark) => mark[0]), event);
    return place < 0 ? null : timeline.marks[place];
  }

  // What happens at an event, or just before it where only small blocks come and go.
  function blockAt(event) {
    if (!lives) return null;
    const place = placeOf(lives.start, event);
    if (place < 0) return null;
    const [module, op, category, tensor, where] = lives.holders[lives.holder[place]];
    return {
      block: place, isHere: lives.start[place] === event, start: lives.start[place], size: lives.size[place],
      end: lives.end[place], module: lives.modules[module], op: lives.ops[op],
      category: lives.categories[category], tensor: lives.tensors[tensor], where: lives.wheres[where],
    };
  }

  // Bytes by module and category at an instant: of every block at the peak, with what the allocator
  // rounded up beside them; elsewhere of large ones.
  function modulesAt(event) {
    if (event === timeline.peak && data.peak.length) {
      const known = data.peak.reduce((sum, entry) => sum + entry[3], 0);
      return { entries: data.peak, isWhole: true, rounding: Math.max(plan.peakAllocated - known, 0) };
    }
    const entries = aliveAt(event).map((block) => {
      const [module, op, category] = lives.holders[lives.holder[block]];
      return [lives.modules[module], category, lives.ops[op], lives.size[block]];
    });
    return { entries, isWhole: !lives || lives.least === 0, rounding: 0 };
  }

  // what all names of modules but a few begin with, as "transformer."
  const heads = new Map();
  for (const module of lives ? lives.modules : []) {
    const head = module.split(".")[0] + ".";
    if (module.includes(".")) heads.set(head, (heads.get(head) || 0) + 1);
  }
  const [head, often] = [...heads].sort((one, other) => other[1] - one[1])[0] || ["", 0];
  const stem = lives && often > 0.9 * lives.modules.length ? head : "";

  const first = timeline.events[0];
  return {
    stem,
    names, first, last, peak: timeline.peak, marks: timeline.marks, lives, plan, placeOf,
    sampleAt, pointsIn, phaseAt, blockAt, modulesAt, top: Math.max(...timeline.reserved, 1),
  };
}
