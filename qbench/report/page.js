"use strict";
// Makes the tables sortable and filterable and draws the plots. The tables are complete without it.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const boards = [...document.querySelectorAll("section.board")];
  const started = new Map();
  const PAGE = 100; // rows of the table on screen at once
  const PICKED = 3; // rows whose layers are shown at first

  function start(section) {
    const number = Number(section.dataset.section);
    const { rows, metric, baseline, floor } = data.sections[number];
    rows.forEach((row, index) => { row.index = index; row.shown = true; });
    const find = (name) => section.querySelector(`[data-filter=${name}]`);
    const picked = new Set(rows.filter((row) => row.front === "front" && row.layout !== null).slice(0, PICKED).map((row) => row.index));

    section.querySelector(".controls").hidden = false;
    const spread = rows.map((row) => row.quality).filter((value) => value > 0);
    find("log").checked = Math.max(...spread) > 3 * Math.min(...spread);
    const table = new DataTable(section.querySelector("table"), {
      order: [],
      orderMulti: true,
      paging: rows.length > PAGE,
      pageLength: PAGE,
      autoWidth: false,
      layout: { topStart: null, topEnd: null, bottomStart: null, bottomEnd: rows.length > PAGE ? "paging" : null },
      columnDefs: [{ targets: [0, -1], orderable: false }],
      language: { emptyTable: "no rows", zeroRecords: "no row fits the filters" },
    });
    const place = table.rows().nodes().toArray().map((node) => Number(node.dataset.row));

    table.search.fixed("filters", (_text, _data, at) => {
      const row = rows[place[at]];
      const [method, bits] = [find("method").value, find("bits").value];
      return (!method || row.method === method) && (!bits || row.bits === bits) && (!find("best").checked || row.front !== "");
    });
    const filter = () => { table.search(find("text").value).draw(); };
    for (const name of ["text", "method", "bits", "best"]) find(name).addEventListener("input", filter);
    for (const name of ["log", "size"]) find(name).addEventListener("input", () => { drawQuality(); });
    table.on("draw", () => {
      rows.forEach((row) => { row.shown = false; });
      table.rows({ search: "applied" }).nodes().each((node) => { rows[Number(node.dataset.row)].shown = true; });
      const count = rows.filter((row) => row.shown).length;
      section.querySelector(".count").textContent = `${count} of ${rows.length} rows`;
      drawQuality();
    });

    table.on("click", "button", (event) => { copy(event.target); });
    table.on("change", "td.pick input", (event) => { pick(Number(event.target.closest("tr").dataset.row), event.target.checked); });
    function pick(index, on) {
      if (on) picked.add(index); else picked.delete(index);
      const box = table.row((_i, _d, node) => Number(node.dataset.row) === index).node().querySelector("td.pick input");
      box.checked = on;
      drawLayers();
      drawSpread();
    }

    const color = { domain: [...new Set(rows.map((row) => row.method))], scheme: "observable10" };
    function drawQuality() {
      const y = { label: `↑ ${metric}`, type: find("log").checked ? "log" : "linear", grid: true, ticks: 6, tickFormat: number3 };
      const size = find("size").value;
      quality("size", size, { label: size === "bpw" ? "bits per weight →" : "model, MB →", grid: true, nice: true }, y, true);
      quality("seconds", "seconds", { label: "seconds quantizing →", type: "log", grid: true, ticks: 5, tickFormat: number3 }, y, false);
    }
    function quality(name, x, xScale, y, frontier) {
      const drawable = rows.filter((row) => row.quality !== null && (xScale.type !== "log" || row[x] > 0));
      const best = x === "bpw" ? drawable.filter((row) => row.front === "front").sort((a, b) => a[x] - b[x]) : unbeaten(drawable, x);
      const bars = drawable.filter((row) => row.low !== null && row.high !== null && (y.type !== "log" || row.low > 0));
      const opacity = (row) => (row.shown ? 1 : 0.12);
      const svg = Plot.plot({
        width: 680, height: 400, marginLeft: 55, marginBottom: 42, inset: 10, x: xScale, y, color: { ...color, legend: true },
        marks: [
          baseline === null || floor === null ? null : Plot.rect([0], { y1: baseline - floor, y2: baseline + floor, fill: "currentColor", fillOpacity: 0.12, ariaLabel: "floor" }),
          baseline === null ? null : Plot.ruleY([baseline], { strokeDasharray: "4 3", strokeOpacity: 0.6 }),
          baseline === null ? null : Plot.text([baseline], { y: (d) => d, frameAnchor: "right", text: () => "16 bit", dy: -7, fillOpacity: 0.6 }),
          frontier ? Plot.line(best, { x, y: "quality", curve: "step-after", strokeOpacity: 0.45 }) : null,
          Plot.ruleX(bars, { x, y1: "low", y2: "high", stroke: "method", strokeWidth: 1.5, strokeOpacity: (row) => 0.7 * opacity(row) }),
          Plot.dot(drawable, {
            x, y: "quality", fill: "method", r: (row) => (row.front === "front" ? 5.5 : 4), fillOpacity: opacity, sort: null,
            stroke: (row) => (row.front === "front" ? "currentColor" : "none"), ariaLabel: "label",
          }),
          Plot.tip(drawable, Plot.pointer({ x, y: "quality", title: describe, fill: "var(--card)" })),
        ],
      });
      svg.addEventListener("click", () => { if (svg.value) pick(svg.value.index, !picked.has(svg.value.index)); });
      const place = section.querySelector(`[data-plot=${name}]`);
      place.replaceChildren(svg);
      const without = rows.length - drawable.length;
      place.parentNode.querySelector(".without").textContent = without ? ` Not drawn, for want of a number: ${without}.` : "";
    }
    function unbeaten(drawable, x) { // of the rows by size, those that are better than all smaller ones
      let least = Infinity;
      return [...drawable].sort((a, b) => a[x] - b[x] || a.loss - b.loss).filter((row) => row.loss < least && ((least = row.loss), true));
    }
    function describe(row) {
      const rank = row.rank === null ? "" : `, rank ${row.rank}`;
      return `${row.label}${rank}\n${metric} ${number3(row.quality)}\n${row.bpw.toFixed(3)} bits per weight, ${number3(row.megabytes)} MB\n${number3(row.seconds)} s quantizing`;
    }
    function drawLayers() {
      const chosen = rows.filter((row) => picked.has(row.index) && row.layout !== null);
      const points = chosen.flatMap((row) => layers(row));
      section.querySelector(".layers").hidden = points.length === 0;
      if (points.length === 0) return;
      const kinds = [...new Set(points.map((point) => point.kind))];
      const svg = Plot.plot({
        width: Math.max(section.clientWidth - 40, 150 * kinds.length), height: 300, marginLeft: 50, marginTop: 45, marginBottom: 40,
        x: { label: "block →", ticks: 3 }, y: { label: "↑ relative error", grid: true, zero: true },
        fx: { label: null, domain: kinds }, color: { legend: true, domain: chosen.map((row) => row.label), scheme: "observable10" },
        marks: [
          Plot.frame({ strokeOpacity: 0.15 }),
          Plot.line(points, { x: "depth", y: "error", fx: "kind", stroke: "label", z: "label", strokeOpacity: 0.6 }),
          Plot.dot(points, { x: "depth", y: "error", fx: "kind", fill: "label", r: 2 }),
          Plot.tip(points, Plot.pointer({ x: "depth", y: "error", fx: "kind", fill: "var(--card)",
            title: (point) => `${point.label}\nblock ${point.depth}, ${point.kind}\nerror ${point.error.toPrecision(4)}` })),
        ],
      });
      section.querySelector("[data-plot=layers]").replaceChildren(svg);
    }

    function drawSpread() {
      const chosen = rows.filter((row) => row.kl !== null && (picked.has(row.index) || row.floor));
      section.querySelector(".spread").hidden = !chosen.some((row) => !row.floor);
      const bins = chosen.flatMap((row) => row.kl.map((share, i) => ({ label: row.label, floor: row.floor, share,
        x1: 10 ** (i ? data.edges[i - 1] : data.edges[0] - 0.2), x2: 10 ** (data.edges[i] ?? data.edges.at(-1) + 0.2) })));
      const svg = Plot.plot({
        width: Math.min(section.clientWidth - 40, 900), height: 260, marginLeft: 50, marginBottom: 40,
        x: { label: "KL, nats →", type: "log", ticks: [-8, -6, -4, -2, 0, 2].map((d) => 10 ** d), tickFormat: (d) => d.toExponential(0) }, y: { label: "↑ share of positions", grid: true, percent: true },
        color: { legend: true, domain: chosen.map((row) => row.label), scheme: "observable10" },
        marks: [false, true].map((floor) => Plot.lineY(bins.filter((bin) => bin.floor === floor), {
          x: (bin) => Math.sqrt(bin.x1 * bin.x2), y: "share", stroke: "label", z: "label", curve: "step", strokeDasharray: floor ? "4 3" : null,
        })),
      });
      section.querySelector("[data-plot=kl]").replaceChildren(svg);
      const color = { domain: chosen.map((row) => row.label), scheme: "observable10" };
      const along = (name, parts, y, xLabel, yLabel) => {
        const points = chosen.flatMap((row) => row[parts].map(([x, kl, changed]) => ({ label: row.label, floor: row.floor, x, kl, changed })));
        const some = points.filter((point) => point[y] !== null);
        section.querySelector(`[data-plot=${name}]`).replaceChildren(Plot.plot({
          width: 400, height: 240, marginLeft: 55, marginBottom: 40, color, x: { label: xLabel, nice: true, domain: parts === "confidence" ? [0, 1] : undefined }, y: { label: yLabel, grid: true, zero: true, tickFormat: number3 },
          marks: [Plot.lineY(some, { x: "x", y, stroke: "label", z: "label" }), Plot.dot(some, { x: "x", y, fill: "label", r: 2.5 })],
        }));
      };
      along("kl-confidence", "confidence", "kl", "confidence of the original →", "↑ KL, nats");
      along("changed-confidence", "confidence", "changed", "confidence of the original →", "↑ top token changed");
      along("kl-position", "position", "kl", "token of the window →", "↑ KL, nats");
    }

    for (const index of picked) table.row((_i, _d, node) => Number(node.dataset.row) === index).node().querySelector("td.pick input").checked = true;
    table.draw();
    drawLayers();
    drawSpread();
    return table;
  }

  function anatomy(section) {
    const { cells, kinds, measured, by_block: blocks } = data.anatomies[Number(section.dataset.anatomy)];
    const find = (name) => section.querySelector(`[data-filter=${name}]`);
    const across = { label: "block →", domain: [...new Set(cells.map((cell) => cell.block))].sort((a, b) => a - b) };
    const width = Math.max(section.clientWidth - 40, 500);
    const marginLeft = 150;
    const draw = () => {
      const name = find("value").value;
      const drawable = cells.filter((cell) => cell.block !== null && cell[name] !== null && (name === "error" || cell[name] > 0));
      section.querySelector(".heat").hidden = drawable.length === 0;
      section.querySelector(".heat .without").textContent =
        name === "kl" && measured === false ? " No single linear was measured: a cell is put together from its kind's and its block's KL." : "";
      if (drawable.length === 0) return;
      section.querySelector("[data-plot=heat]").replaceChildren(Plot.plot({
        width, height: 60 + 28 * kinds.length, marginLeft, marginBottom: 40, padding: 0.05, x: across, y: { label: null, domain: kinds },
        color: { type: name === "error" ? "linear" : "log", scheme: "YlOrRd", legend: true, width: 320, ticks: 4, label: find("value").selectedOptions[0].text, tickFormat: number3 },
        marks: [
          Plot.cell(drawable, { x: "block", y: "kind", fill: name }),
          Plot.tip(drawable, Plot.pointer({ x: "block", y: "kind", fill: "var(--card)", title: (cell) => `block ${cell.block}, ${cell.kind}\n` +
            `KL ${number3(cell.kl)}${measured === false ? ", from the margins" : ""}\nweight error ${number3(cell.error)}\nimbalance ${number3(cell.imbalance)}, kurtosis ${number3(cell.kurtosis)}` })),
        ],
      }));
    };
    section.querySelector(".controls").hidden = false;
    find("value").addEventListener("input", draw);
    draw();
    section.querySelector(".margin").hidden = blocks.length === 0;
    if (blocks.length > 0) section.querySelector("[data-plot=block]").replaceChildren(Plot.plot({
      width, height: 160, marginLeft, marginBottom: 40, x: across, y: { label: "↑ KL, nats", grid: true, ticks: 4 },
      marks: [Plot.barY(blocks, { x: "block", y: "kl", fill: "#c0504d" }), Plot.ruleY([0])],
    }));
  }

  function layers(row) {
    const [kinds, kindOf, depthOf] = data.layouts[row.layout];
    const bytes = Uint8Array.from(atob(row.errors), (c) => c.charCodeAt(0));
    const codes = new DataView(bytes.buffer);
    return kindOf.map((kind, i) => {
      const code = codes.getUint16(2 * i, true);
      const error = code === 0 ? 0 : data.smallest * 10 ** ((code - 1) / data.steps);
      return { kind: kinds[kind], depth: depthOf[i], error, label: row.label };
    });
  }

  function number3(value) {
    return value === null ? "" : Number(value.toPrecision(value >= 1000 ? 4 : 3)).toLocaleString("en", { maximumFractionDigits: 4 });
  }

  async function copy(button) {
    const code = button.nextElementSibling;
    try {
      await navigator.clipboard.writeText(code.textContent);
    } catch { // not allowed here, for instance in a page opened from a file
      getSelection().selectAllChildren(code);
      document.execCommand("copy");
    }
    button.textContent = "copied";
    setTimeout(() => { button.textContent = "copy"; }, 1200);
  }

  function show(number) {
    boards.forEach((section, index) => { section.hidden = index !== number; });
    if (boards[number] && !started.has(number)) started.set(number, start(boards[number]));
  }
  document.getElementById("section")?.addEventListener("input", (event) => { show(Number(event.target.value)); });
  show(0);
  document.querySelectorAll("section.anatomy").forEach(anatomy);
})();
